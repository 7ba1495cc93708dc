"""Exports: exactly the keys of each engine's layout, read back to the head's own logits, and refusals in one line"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmspec import checkpoint
from mmspec.export.engines import ENGINES, default_taps
from mmspec.export.folder import FILES, assembled
from mmspec.export.layouts import Source, layout
from mmspec.export.run import export
from mmspec.export.verify import TOLERANCE, Mismatch, compared, head_logits, make_sample, plain_logits
from mmspec.heads import viskip
from mmspec.recipe import head_kinds, import_head
from mmspec.targets import describe_target, load_target
from mmspec.types import InputError
from scripts import export as script
from tests import families

LAYERS = 7
"""The fewest that give three different default taps."""
D, HEADS, KV, HEAD, INNER, V, SMALL = 32, 4, 2, 8, 40, 61, 50
TAPS = (4, 1, 6)
"""In an order that is not that of layers."""

BLOCK = {
    "self_attn.q_proj.weight": (HEADS * HEAD, 2 * D),
    "self_attn.k_proj.weight": (KV * HEAD, 2 * D),
    "self_attn.v_proj.weight": (KV * HEAD, 2 * D),
    "self_attn.o_proj.weight": (D, HEADS * HEAD),
    "mlp.gate_proj.weight": (INNER, D),
    "mlp.up_proj.weight": (INNER, D),
    "mlp.down_proj.weight": (D, INNER),
    "input_layernorm.weight": (D,),
    "hidden_norm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
}
ENDS = {"fc.weight": (D, 3 * D), "norm.weight": (D,), "lm_head.weight": (SMALL, D), "d2t": (SMALL,), "t2d": (V,)}
LLAMA = {
    "model_type": "llama", "hidden_size": D, "num_hidden_layers": 1, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "head_dim": HEAD, "intermediate_size": INNER, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "vocab_size": V, "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA as a folder, in fp32."""
    return saved(tmp_path_factory.mktemp("llava"), "llava")


def saved(folder: Path, family: str) -> Path:
    families.save(families.build(family, dtype="float32", n_layers=LAYERS), folder)
    return folder


def trained(folder: Path, place: Path, kind: str = "eagle3", **values: Any) -> Path:
    """A run folder of a head whose every weight is drawn."""
    torch.manual_seed(7)
    target, module = load_target(str(place)), import_head(kind)
    if kind == "eagle3":
        values = {"draft_vocab_size": SMALL, "taps": TAPS, "image_input": "aux", "intermediate_size": INNER} | values
    config = module.Config(**values).resolve(target.shape)
    head = module.Head(config)
    head.prepare(target, lambda: torch.rand(target.shape.vocab_size).double())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    checkpoint.save_head(folder, head.state_dict(), config, target)
    checkpoint.save_tree(folder, checkpoint.DraftTree(5, 4, 20))
    return folder


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)
    return load_file(str(folder / "model.safetensors")), json.loads((folder / "config.json").read_text())


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


# ---- what is written, literally ----


def test_the_sglang_layout(tmp_path: Path, place: Path):
    run = trained(tmp_path / "run", place)
    export(run, "sglang", tmp_path / "out", str(place))
    tensors, config = contents(tmp_path / "out")
    assert shapes(tensors) == ENDS | {f"midlayer.{name}": shape for name, shape in BLOCK.items()}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in ("d2t", "t2d")} == {torch.float32}
    assert config == {
        "architectures": ["LlamaForCausalLMEagle3"],
        **LLAMA,
        "rope_theta": 10000.0,
        "draft_vocab_size": SMALL,
        # SGLang adds 1 to these; states are read in the order of layers.
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [0, 3, 5]},
    }


def test_the_speculators_layout(tmp_path: Path, place: Path):
    run = trained(tmp_path / "run", place)
    export(run, "speculators", tmp_path / "out", str(place), verifier="org/name")
    tensors, config = contents(tmp_path / "out")
    own = {f"layers.0.{name}": shape for name, shape in BLOCK.items()}
    assert shapes(tensors) == ENDS | own | {"embed_tokens.weight": (V, D)}
    assert torch.equal(tensors["embed_tokens.weight"], load_target(str(place)).embed(torch.arange(V)))
    assert config == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": SMALL,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "target_hidden_size": D,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
        "transformer_layer_config": {
            **LLAMA, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": 5, "verifier_accept_k": 1, "accept_tolerance": 0.0}
            ],
            "verifier": {"name_or_path": "org/name", "architectures": ["LlavaForConditionalGeneration"]},
        },
    }  # fmt: skip


@pytest.mark.parametrize("own", [False, True])
def test_the_medusa_layout(tmp_path: Path, place: Path, own: bool):
    run = trained(tmp_path / "run", place, "medusa", n_ahead=3, n_blocks=2, own_head=own)
    export(run, "vllm-medusa", tmp_path / "out", str(place))
    tensors, config = contents(tmp_path / "out")
    wanted: dict[str, tuple[int, ...]] = {
        f"blocks.{i}.layers.{j}.{part}": shape
        for i in range(3) for j in range(2) for part, shape in (("weight", (D, D)), ("bias", (D,)))
    }  # fmt: skip
    assert shapes(tensors) == wanted | {f"lm_heads.{i}.weight": (V, D) for i in range(3 if own else 1)}
    assert config == {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": D, "vocab_size": V, "num_heads": 3,
        "num_hidden_layers": 2, "medusa_fc_bias": True, **({} if own else {"original_lm_head": True}),
    }  # fmt: skip


@pytest.mark.parametrize("format", ["sglang", "speculators"])
def test_maps_of_the_draft_vocabulary(tmp_path: Path, place: Path, format: str):
    """`d2t` is an offset, `t2d` a mask, both of the head's own tokens; a head of all tokens has neither."""
    run = trained(tmp_path / "run", place)
    export(run, format, tmp_path / "out", str(place))
    tensors, _ = contents(tmp_path / "out")
    ids = load_file(str(run / "head.safetensors"))["draft_ids"]
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (torch.int64, torch.bool)
    assert (torch.arange(SMALL) + tensors["d2t"]).tolist() == ids.tolist()
    assert tensors["t2d"].nonzero().flatten().tolist() == ids.tolist()
    export(trained(tmp_path / "all", place, draft_vocab_size=0), format, tmp_path / "whole", str(place))
    tensors, config = contents(tmp_path / "whole")
    assert not {"d2t", "t2d"} & set(tensors)
    assert config["draft_vocab_size"] == V


def test_layer_ids_that_are_the_default_are_not_said_to_sglang(tmp_path: Path, place: Path):
    """vLLM reads the layout too and counts explicit ids from another layer; of the default both read the same."""
    assert default_taps(LAYERS) == (2, 3, 4)
    done = export(trained(tmp_path / "run", place, taps=()), "sglang", tmp_path / "out", str(place), ways=())
    assert contents(tmp_path / "out")[1]["eagle_config"] == {"use_aux_hidden_state": True}
    assert not any("--format speculators" in note for note in done.notes)
    other = export(trained(tmp_path / "run", place), "sglang", tmp_path / "other", str(place))
    assert any("takes them for the layers before" in note for note in other.notes)


@pytest.mark.parametrize("format", ["sglang", "speculators"])
def test_positions_on_three_axes(tmp_path: Path, format: str):
    """Said where the head has them and nowhere else; its sections are those that it turns by."""
    place = saved(tmp_path / "qwen", "qwen2_5_vl")
    for rope in ("mrope", "1d"):
        run = trained(tmp_path / f"run_{rope}", place, rope=rope)
        done = export(run, format, tmp_path / rope, str(place), ways=())
        config = contents(tmp_path / rope)[1]
        said = config.get("rope_scaling") or config.get("transformer_layer_config", {}).get("rope_parameters")
        assert (said or {}).get("mrope_section") == ([2, 1, 1] if rope == "mrope" else None)
        assert ("rope_scaling" in config) == (format == "sglang" and rope == "mrope")
        assert any("counts tokens" in note for note in done.notes) == (rope == "1d")
        assert not any("hook" in note for note in done.notes)


# ---- what is read back ----

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("sglang", "eagle3", {}),
    ("speculators", "eagle3", {"n_kv_heads": 4, "head_dim": 12, "draft_vocab_size": 0}),
    ("speculators", "eagle3", {"n_kv_heads": 1, "rope_theta": 500.0}),
    ("vllm-medusa", "medusa", {"n_ahead": 2}),
    ("vllm-medusa", "medusa", {"n_ahead": 3, "own_head": True}),
]


@pytest.mark.parametrize(("format", "kind", "values"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_drafts_what_the_head_drafts(
    tmp_path: Path, place: Path, format: str, kind: str, values: dict[str, Any], dtype: str
):
    run = trained(tmp_path / "run", place, kind, **values)
    done = export(run, format, tmp_path / "out", str(place), dtype=dtype, ways=())
    assert [check.way for check in done.checks] == ["computed from its files", "converted back"]
    assert all(check.error < 1e-4 and check.scale > 0.1 for check in done.checks)
    floats = {tensor.dtype for tensor in contents(tmp_path / "out")[0].values() if tensor.is_floating_point()}
    assert floats == {getattr(torch, dtype)}


def spoil(what: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        layer, ids = config["transformer_layer_config"], "eagle_aux_hidden_state_layer_ids"
        if what == "layer ids":
            config[ids] = [i - 1 for i in config[ids]]
        elif what == "order of states":
            tensors["fc.weight"] = tensors["fc.weight"].roll(D, 1)
        elif what == "norms exchanged":
            one, other = "layers.0.input_layernorm.weight", "layers.0.hidden_norm.weight"
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif what == "halves of the input":
            tensors["layers.0.self_attn.q_proj.weight"] = tensors["layers.0.self_attn.q_proj.weight"].roll(D, 1)
        elif what == "norm before residual":
            config["norm_before_residual"] = True
        elif what == "base of positions":
            layer["rope_parameters"]["rope_theta"] = 5000.0
        elif what == "vocabulary":
            tensors["d2t"] = tensors["d2t"].clone().index_fill(0, torch.tensor([SMALL - 1]), 0)
        elif what == "mask":
            tensors["t2d"] = ~tensors["t2d"]
        elif what == "embeddings":
            tensors["embed_tokens.weight"] = tensors["embed_tokens.weight"].roll(1, 0)

    return change


@pytest.mark.parametrize(
    "what",
    [
        "layer ids", "order of states", "norms exchanged", "halves of the input", "norm before residual",
        "base of positions", "vocabulary", "mask", "embeddings",
    ],
)  # fmt: skip
def test_the_plain_computation_notices(tmp_path: Path, place: Path, what: str):
    """Every fact of the layout that no shape gives away."""
    made = checkpoint.load(trained(tmp_path / "run", place))
    target = load_target(str(place))
    export(made.folder, "speculators", tmp_path / "out", str(place))
    tensors, config = contents(tmp_path / "out")
    spoil(what)(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(tmp_path / "out/model.safetensors"))
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    sample = make_sample(made, target, torch.float32)
    ours = head_logits(made.head(), sample, torch.empty(0))
    with pytest.raises(Mismatch, match="verification failed"):
        compared("plain", ours, plain_logits(tmp_path / "out", sample, made)).require()


def test_nothing_is_there_when_the_verification_fails(tmp_path: Path, place: Path):
    run = trained(tmp_path / "run", place)

    def way(folder: Path, *rest: Any) -> list[Any]:
        assert (folder / "model.safetensors").is_file()
        raise Mismatch("as if")

    with pytest.raises(Mismatch):
        export(run, "sglang", tmp_path / "deep" / "out", str(place), ways=[way])
    assert not list((tmp_path / "deep").iterdir())


# ---- what is refused ----


def refused(said: str, run: Path, format: str, out: Path, **more: Any) -> None:
    with pytest.raises(InputError) as error:
        export(run, format, out, **more)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("format", list(ENGINES))
@pytest.mark.parametrize("kind", head_kinds())
def test_kinds_that_an_engine_does_not_serve(tmp_path: Path, place: Path, format: str, kind: str):
    if kind == ENGINES[format].kind:
        return
    run = trained(tmp_path / "run", place, kind)
    refused(f"serves no {kind} head", run, format, tmp_path / "out", target=str(place))


@pytest.mark.parametrize("format", ["sglang", "speculators"])
@pytest.mark.parametrize("image_input", ["embeds", "none"])
def test_images_that_an_engine_would_show_otherwise(tmp_path: Path, place: Path, format: str, image_input: str):
    run = trained(tmp_path / "run", place, image_input=image_input)
    refused(f"image_input {image_input!r}", run, format, tmp_path / "out", target=str(place))
    refused("head.image_input=aux", run, format, tmp_path / "out", target=str(place))


def test_an_sglang_that_merges_images(tmp_path: Path, place: Path):
    run = trained(tmp_path / "run", place, image_input="embeds")
    export(run, "sglang", tmp_path / "out", str(place), ways=(), merged_images=True)
    assert "image_input: embeds" in (tmp_path / "out" / "NOTES.md").read_text()
    more = {"target": str(place), "merged_images": True}
    refused("--merged-images is about SGLang", run, "speculators", tmp_path / "no", **more)
    refused("leave that out", trained(tmp_path / "aux", place), "sglang", tmp_path / "no", **more)


def test_a_controller_is_left_behind_only_when_told(tmp_path: Path, place: Path):
    run, target = trained(tmp_path / "run", place), load_target(str(place))
    config = viskip.Config(width=16, depth=5).resolve(target.shape)
    checkpoint.save_controller(run, viskip.Head(config).state_dict(), config, target)
    refused("has a ViSkip controller", run, "sglang", tmp_path / "out", target=str(place))
    export(run, "sglang", tmp_path / "out", str(place), head_only=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FILES)


def test_heads_that_the_layout_cannot_say(tmp_path: Path, place: Path):
    early = trained(tmp_path / "early", place, taps=(0, 2, 4))
    refused("hidden state 0, the embeddings", early, "sglang", tmp_path / "out", target=str(place))
    axes = trained(tmp_path / "axes", place, rope="mrope")
    refused("train with head.rope=1d", axes, "speculators", tmp_path / "out", target=str(place))
    blind = trained(tmp_path / "blind", place)
    said = json.loads((blind / "head.json").read_text())
    (blind / "head.json").write_text(json.dumps(said | {"blind": True}))
    refused("vision-blind", blind, "sglang", tmp_path / "out", target=str(place))


def test_a_tensor_without_a_place(tmp_path: Path, place: Path):
    made, described = checkpoint.load(trained(tmp_path / "run", place)), describe_target(str(place))
    state = load_file(str(made.folder / "head.safetensors")) | {"block.more.weight": torch.zeros(2)}
    with pytest.raises(InputError, match=r"no place for the head's block\.more\.weight"):
        layout("sglang", Source(made, state, described, None, "org/name", torch.float32))


def test_targets_that_are_not_the_runs(tmp_path: Path, place: Path):
    run = trained(tmp_path / "run", place)
    families.save(families.build("llava", dtype="float32"), tmp_path / "short")
    refused("n_layers 7", run, "sglang", tmp_path / "out", target=str(tmp_path / "short"))
    families.save(families.build("llava", dtype="float32", seed=5, n_layers=LAYERS), tmp_path / "other")
    other = {"target": str(tmp_path / "other")}
    refused("fingerprint", run, "speculators", tmp_path / "out", **other)
    refused("fingerprint", run, "sglang", tmp_path / "out", ways=(), **other)
    refused("name its folder by --target", run, "sglang", tmp_path / "out")
    refused("cannot be loaded", run, "sglang", tmp_path / "out", target=str(tmp_path / "none"))
    refused("unknown", run, "tensorrt", tmp_path / "out", target=str(place))
    refused("--dtype", run, "sglang", tmp_path / "out", target=str(place), dtype="int8")


def test_a_placeholder_that_is_not_the_targets(tmp_path: Path, place: Path):
    made = checkpoint.load(trained(tmp_path / "run", place))
    state = load_file(str(made.folder / "head.safetensors"))
    checkpoint.write_tensors(made.folder / "head.safetensors", state | {"placeholder": state["placeholder"] + 1})
    refused("placeholder", made.folder, "speculators", tmp_path / "out", target=str(place))


def test_what_is_never_overwritten(tmp_path: Path, place: Path):
    run, target = trained(tmp_path / "run", place), str(place)
    out = tmp_path / "out"
    out.mkdir()
    export(run, "sglang", out, target)  # an empty folder is a place to write to
    before = (out / "config.json").read_text()
    for force in (False, True):
        with pytest.raises(InputError, match="is there already" if not force else "no earlier export"):
            export(run, "sglang", run, target, force=force)
    with pytest.raises(InputError, match="not empty"):
        export(run, "speculators", out, target)
    (out / "more.txt").write_text("mine")
    with pytest.raises(InputError, match=r"more\.txt"):
        export(run, "speculators", out, target, force=True)
    (out / "more.txt").unlink()
    assert (out / "config.json").read_text() == before
    export(run, "speculators", out, target, force=True)
    assert contents(out)[1]["speculators_model_type"] == "eagle3"
    (tmp_path / "link").symlink_to(out)
    for name in ("link", "run/head.json"):
        with pytest.raises(InputError, match="no folder"):
            export(run, "sglang", tmp_path / name, target, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out", "run"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path):
    """What was there before stays, too, until the new one is whole; the umask decides who may read it."""
    out, before = tmp_path / "out", os.umask(0o022)
    (tmp_path / ".out.1.new").mkdir()  # of an export that was killed
    try:
        with assembled(out) as folder:
            (folder / "config.json").write_text("1")
            assert not out.exists()
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o755

    def stopped() -> None:
        with assembled(out, force=True) as folder:
            (folder / "config.json").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (out / "config.json").read_text() == "1"
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.1.new"}


# ---- the command ----


def test_the_command(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]):
    run, out = trained(tmp_path / "run", place), tmp_path / "out"
    words = [str(run), "--format", "sglang", "--target", str(place), "--out", str(out), "--device", "cpu"]
    assert script.main([*words, "--verify"]) == 0
    said = capsys.readouterr()
    assert said.out.count("verified, ") == 2
    assert f"eagle3 head for SGLang: {out}" in said.out
    # LLaVA-1.5 is what no engine has a hook for: a warning, which stays with the folder.
    notes = (out / "NOTES.md").read_text()
    for text in (said.err, notes):
        assert "no EAGLE-3 hook for llava" in text
    assert "--speculative-num-steps 5" in notes
    assert "converted back" in notes
    assert str(tmp_path) not in notes + (out / "config.json").read_text()
    for wrong, status, text in (
        (words, 2, "not empty"),
        ([*words[:2], "tensorrt", *words[3:]], 2, "invalid choice"),
        ([str(tmp_path / "none"), *words[1:6], str(tmp_path / "new")], 2, "does not exist"),
    ):
        assert script.main(wrong) == status
        error = capsys.readouterr().err
        assert error.startswith("export: error: ")
        assert text in error
        assert len(error.strip().splitlines()) == 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as status:
        script.main(["--help"])
    assert status.value.code == 0
    said = capsys.readouterr().out
    for word in (*ENGINES, "image_input", "NOTES.md", "MMSPEC_SPECULATORS_PYTHON", "--head-only", "--merged-images"):
        assert word in said


# ---- the speculators package, where there is one ----


@pytest.mark.skipif(script.SPECULATORS not in os.environ, reason=f"set {script.SPECULATORS} to a Python that has it")
@pytest.mark.parametrize("values", [{}, {"draft_vocab_size": 0, "head_dim": 12, "n_kv_heads": 4}])
def test_speculators_drafts_the_same(
    tmp_path: Path, place: Path, values: dict[str, Any], record_property: Callable[[str, object], None]
):
    """The package loads the folder with its verifier, and drafts from it: a prefix, and two tokens behind its end."""
    run, python = trained(tmp_path / "run", place, **values), os.environ[script.SPECULATORS]
    how = {"verifier": "org/name", "ways": script.ways("speculators")}
    done = export(run, "speculators", tmp_path / "out", str(place), **how)
    assert [check.way for check in done.checks][-1].startswith("drafted by speculators 0.9")
    check, said = script.by_speculators(python, tmp_path / "out", done.made, load_target(str(place)), torch.float32)
    print(check)
    record_property("error", check.error)
    assert check.error < TOLERANCE
    assert (said["class"], said["layer_ids"], said["norm_before_residual"]) == ("Eagle3DraftModel", [1, 4, 6], False)
