"""Converters: files of every public layout, written here, give the logits of a plain computation from their tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmspec.api import drafter_and_policy
from mmspec.checkpoint import load
from mmspec.convert import Source, _unembedding, convert
from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.recipe import head_kinds
from mmspec.sampling import GreedySampler
from mmspec.types import Features, InputError
from scripts import convert as script
from tests import families
from tests.contract.test_heads import dialogue
from tests.tiny import llava
from tests.training import save_target

D, HEADS, KV, HEAD, INNER, V = 32, 4, 2, 8, 40, 61
TAPS = (1, 0, 2)
IDS = sorted({1, 2, *range(5, 60, 2)})
"""Of a draft vocabulary."""
CONFIG = {
    "hidden_size": D, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV,
    "head_dim": HEAD, "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "vocab_size": V,
    "hidden_act": "silu", "model_type": "llama",
}  # fmt: skip


def drawn(*shape: int, scale: float = 0.3) -> Tensor:
    """Numbers that fp32 has too, in which a head is built before it is widened."""
    return (torch.randn(*shape) * scale).double()


def layer(prefix: str, read: int = D, **norms: str) -> dict[str, Tensor]:
    """A decoder layer; `norms` are those beside the one before the MLP."""
    tensors = {
        "self_attn.q_proj": drawn(HEADS * HEAD, read), "self_attn.k_proj": drawn(KV * HEAD, read),
        "self_attn.v_proj": drawn(KV * HEAD, read), "self_attn.o_proj": drawn(D, HEADS * HEAD),
        "mlp.gate_proj": drawn(INNER, D), "mlp.up_proj": drawn(INNER, D), "mlp.down_proj": drawn(D, INNER),
        **{name: (1 + drawn(D)).float().double() for name in ("post_attention_layernorm", *norms)},
    }  # fmt: skip
    return {f"{prefix}{name}.weight": tensor for name, tensor in tensors.items()}


def embeddings() -> Tensor:
    return llava().embed(torch.arange(V)).clone()


def eagle(**norms: str) -> dict[str, Tensor]:
    projection = {"fc.weight": drawn(D, 2 * D), "fc.bias": drawn(D)}
    return projection | {"embed_tokens.weight": embeddings()} | layer("layers.0.", **norms)


def eagle3(prefix: str) -> dict[str, Tensor]:
    tensors = {
        "fc.weight": drawn(D, 3 * D),
        "norm.weight": (1 + drawn(D)).float().double(),
        "lm_head.weight": drawn(len(IDS), D),
    }
    ids = torch.tensor(IDS)
    tensors |= {"d2t": ids - torch.arange(len(ids)), "t2d": torch.isin(torch.arange(V), ids)}
    return tensors | layer(prefix, 2 * D, input_layernorm="", hidden_norm="")


def vispec(n_queries: int = 3) -> dict[str, Tensor]:
    adaptor = {f"imadpt.{name}_proj.weight": drawn(D, D) for name in "kvo"}
    queries = {"imadpt.q": drawn(n_queries, HEADS, HEAD, scale=2.0)}
    return eagle() | adaptor | queries | {"img_fc.weight": drawn(D, 2 * D), "img_fc.bias": drawn(D)}


def publish(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors"))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


# ---- plain computations ----


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """[T, H, Dh] rotated; halves are pairs."""
    angle = positions[:, None] * 5000.0 ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def block(w: dict[str, Tensor], prefix: str, read: Tensor, residual: Tensor, positions: Tensor) -> Tensor:
    """One head, one position at a time."""
    q, k, v = (
        (read @ w[f"{prefix}self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, HEAD)) for name in ("q", "k", "v")
    )
    q, k = turned(q, positions), turned(k, positions)
    out = torch.zeros(len(read), HEADS, HEAD, dtype=torch.float64)
    for t in range(len(read)):
        for head in range(HEADS):
            mine = head // (HEADS // KV)
            weights = (k[: t + 1, mine] @ q[t, head] * HEAD**-0.5).softmax(0)
            out[t, head] = weights @ v[: t + 1, mine]
    x = residual + out.flatten(1) @ w[f"{prefix}self_attn.o_proj.weight"].T
    y = norm(x, w[f"{prefix}post_attention_layernorm.weight"])
    gate, up = (y @ w[f"{prefix}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return x + (F.silu(gate) * up) @ w[f"{prefix}mlp.down_proj.weight"].T


Computed = tuple[Tensor, Tensor]
"""Logits of pairs, and which pairs they are."""


def eagle_logits(w: dict[str, Tensor], f: Features, decoupled: bool = False) -> Computed:
    e, states = f.embeds[0, 1:-1], f.last_hidden[0, :-2]
    u = torch.cat([e, states], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(D))
    if decoupled:
        u = torch.where(f.visual[0, 1:-1, None], e, u)
    name = "layers.0.input_layernorm.weight"
    read = norm(u, w[name]) if name in w else u
    places = torch.arange(len(u))
    return llava().unembed(block(w, "layers.0.", read, u, places)), places


def eagle3_logits(w: dict[str, Tensor], f: Features, prefix: str) -> Computed:
    s = torch.cat([f.hidden[tap][0, :-2] for tap in TAPS], -1) @ w["fc.weight"].T
    e = f.embeds[0, 1:-1]
    read = torch.cat([norm(e, w[f"{prefix}input_layernorm.weight"]), norm(s, w[f"{prefix}hidden_norm.weight"])], -1)
    g = block(w, prefix, read, s, torch.arange(len(s)))
    return norm(g, w["norm.weight"]) @ w["lm_head.weight"].T, torch.arange(len(s))


def vispec_logits(w: dict[str, Tensor], f: Features) -> Computed:
    """One image: two vectors of it in its place, the third in mind of all text behind it."""
    e, states, visual = f.embeds[0, 1:-1], f.last_hidden[0, :-2], f.visual[0, 1:-1]
    shown = e[visual]
    k, v = ((shown @ w[f"imadpt.{name}_proj.weight"].T).unflatten(-1, (HEADS, HEAD)) for name in "kv")
    scores = torch.einsum("qhd,khd->hqk", w["imadpt.q"], k) * HEAD**-0.5
    seen = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1) @ w["imadpt.o_proj.weight"].T
    last = int(visual.nonzero().max())
    c = torch.where((torch.arange(len(e)) > last)[:, None], seen[-1], 0.0)
    injected = torch.cat([states, c], -1) @ w["img_fc.weight"].T + w["img_fc.bias"]
    u = torch.cat([e, injected], -1) @ w["fc.weight"].T + w["fc.bias"]
    u[last - 1 : last + 1] = seen[:-1]
    kept = ~visual
    kept[last - 1 : last + 1] = True
    places = kept.nonzero().flatten()
    text = ~visual[places]
    return llava().unembed(block(w, "layers.0.", u[places], u[places], places))[text], places[text]


def medusa_logits(w: dict[str, Tensor], f: Features, step: int, n_blocks: int) -> Computed:
    x = f.last_hidden[0, :-2]
    for b in range(n_blocks):
        x = x + F.silu(x @ w[f"{step}.{b}.linear.weight"].T + w[f"{step}.{b}.linear.bias"])
    own = w.get(f"{step}.{n_blocks}.weight")
    return llava().unembed(x) if own is None else x @ own.T, torch.arange(len(x))


def medusa(n_ahead: int, n_blocks: int, own: bool) -> dict[str, Tensor]:
    tensors = {}
    for head in range(n_ahead):
        for b in range(n_blocks):
            tensors |= {f"{head}.{b}.linear.weight": drawn(D, D), f"{head}.{b}.linear.bias": drawn(D)}
        if own:
            tensors[f"{head}.{n_blocks}.weight"] = drawn(V, D)
    return tensors


def spelled(tensors: dict[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    """The same tensors by vLLM's names."""
    names = {}
    for name in tensors:
        head, part, *rest = name.split(".")
        end = f"lm_heads.{head}.weight" if int(part) == n_blocks else f"blocks.{head}.layers.{part}.{rest[-1]}"
        names[name] = end
    return {names[name]: tensor for name, tensor in tensors.items()}


def compare(folder: Path, expected: Callable[[Features, int], Computed], steps: int = 1, behind: bool = False) -> None:
    """The converted head's logits from every position of a conversation with an image (fp64, 1e-9), and lossless.

    Args:
        behind: look only at what comes behind the image.
    """
    target, made = llava(), load(folder)
    head: Any = made.head(torch.float64)
    prompt, answer = dialogue(target, 2, images=1)
    features = target.teacher([prompt], [answer], head.taps)
    marks = features.valid.long()
    marks[:, : int(prompt.visual.nonzero().max()) + 1 if behind else 0] = 0
    with torch.no_grad():
        packed, states = head.unroll(replace(features, answer=marks), steps)
        for step in range(steps):
            ours = head.step_logits(step, states[step], target.unembed)
            theirs, places = expected(features, step)
            where = dict(zip(packed.tokens[packed.drafts].tolist(), ours))
            assert len(where) > 10
            for place, logits in zip(places.tolist(), theirs):
                assert behind or place in where
                assert place not in where or torch.allclose(where[place], logits, atol=1e-9, rtol=0), (step, place)
    wanted = families.requests(target, 4, 10)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    drafted = generate(target, wanted, *drafter_and_policy(made, target, "fixed"), GreedySampler(), max_batch=2)
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    said = json.loads((folder / "provenance.json").read_text())
    assert said["converted"]["tensors"]
    assert str(folder.parent) not in json.dumps(said)


# ---- what is read ----


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(5)


def has(kind: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(kind not in head_kinds(), reason=f"there is no {kind} head here")


@pytest.mark.parametrize("config", [CONFIG, {k: v for k, v in CONFIG.items() if k != "head_dim"} | {"bias": True}])
def test_eagle(tmp_path: Path, config: dict[str, Any]):
    tensors = eagle()
    if "bias" in config:
        del tensors["fc.bias"], tensors["embed_tokens.weight"]
    made = convert(publish(tmp_path / "in", tensors, config), "auto", llava(), tmp_path / "out")
    assert (made.kind, made.config.input_norm, made.config.rope_theta) == ("eagle", False, 5000.0)
    compare(tmp_path / "out", lambda f, _: eagle_logits(tensors, f))


@pytest.mark.parametrize("layout", ["eagle3", "eagle3_speculators"])
def test_eagle3(tmp_path: Path, layout: str):
    """Layer ids: SGLang reads what enters the layer after, vLLM what enters the layer itself."""
    prefix = "midlayer." if layout == "eagle3" else "layers.0."
    tensors = eagle3(prefix)
    config: dict[str, Any] = CONFIG | {"draft_vocab_size": len(IDS)}
    config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in TAPS]}
    if layout == "eagle3_speculators":
        config = {
            "speculators_model_type": "eagle3", "norm_before_residual": False, "transformer_layer_config": CONFIG,
            "draft_vocab_size": len(IDS), "eagle_aux_hidden_state_layer_ids": list(TAPS),
        }  # fmt: skip
        tensors["embed_tokens.weight"] = embeddings()
    made = convert(publish(tmp_path / "in", tensors, config), "auto", llava(), tmp_path / "out")
    assert (made.kind, made.config.taps, made.config.draft_vocab_size) == ("eagle3", TAPS, len(IDS))
    head: Any = made.head()
    assert head.draft_ids.tolist() == IDS
    compare(tmp_path / "out", lambda f, _: eagle3_logits(tensors, f, prefix))


def test_eagle3_of_the_whole_vocabulary_says_nothing_of_layers_or_tokens(tmp_path: Path):
    tensors = eagle3("midlayer.") | {"lm_head.weight": drawn(V, D)}
    del tensors["d2t"], tensors["t2d"]
    made = convert(publish(tmp_path / "in", tensors, CONFIG), "eagle3", llava(), tmp_path / "out", taps=TAPS)
    head: Any = made.head()
    assert (made.config.taps, head.draft_ids) == (TAPS, None)
    compare(tmp_path / "out", lambda f, _: eagle3_logits(tensors, f, "midlayer."))
    other = convert(tmp_path / "in", "eagle3", llava(), tmp_path / "default")
    assert other.config.taps == (0, 1, 2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("spelling", ["medusa", "prefixed", "medusa_vllm"])
def test_medusa(tmp_path: Path, spelling: str, own: bool):
    n_blocks = 1 + own
    tensors = medusa(3, n_blocks, own)
    files, config = tensors, None
    if spelling == "prefixed":
        files = {f"medusa_head.{name}": tensor for name, tensor in tensors.items()}
    if spelling == "medusa_vllm":
        files, config = spelled(tensors, n_blocks), {"model_type": "medusa", "num_heads": 3, "logit_scale": 1.0}
        if not own:
            config["original_lm_head"] = True
            files |= {"lm_heads.0.weight": llava().unembed(torch.eye(D, dtype=torch.float64)).T.contiguous()}
    made = convert(publish(tmp_path / "in", files, config), "auto", llava(), tmp_path / "out")
    assert (made.config.n_ahead, made.config.n_blocks, made.config.own_head) == (3, n_blocks, own)
    assert made.tree.depth == 3
    compare(tmp_path / "out", lambda f, step: medusa_logits(tensors, f, step, n_blocks), steps=3)


def test_a_copy_of_the_unembedding_is_compared_by_a_few_columns_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The logits of all unit vectors at once are gigabytes at a public target's size."""
    target, asked = llava(), []
    unembed = target.unembed
    weight = unembed(torch.eye(D, dtype=torch.float64)).T.contiguous()

    def counted(hidden: Tensor) -> Tensor:
        asked.append(len(hidden))
        return unembed(hidden)

    monkeypatch.setattr(target, "unembed", counted)
    monkeypatch.setattr("mmspec.convert.UNITS", 5)
    source = Source(publish(tmp_path / "same", {"lm_head.weight": weight}, None))
    _unembedding(source, "lm_head.weight", target)
    assert not source.tensors
    assert (max(asked), sum(asked)) == (5, D)
    other = Source(publish(tmp_path / "other", {"lm_head.weight": weight.flip(1)}, None))
    with pytest.raises(InputError, match="is not that of"):
        _unembedding(other, "lm_head.weight", target)


@has("msd")
@pytest.mark.parametrize("input_norm", [False, True])
def test_msd(tmp_path: Path, input_norm: bool):
    """Visual pairs enter past the projection; without an input norm its files are EAGLE's, so the layout is named."""
    tensors = eagle(input_layernorm="") if input_norm else eagle()
    layout = "auto" if input_norm else "msd"
    made = convert(publish(tmp_path / "in", tensors, CONFIG), layout, llava(), tmp_path / "out")
    assert (made.kind, made.config.input_norm) == ("msd", input_norm)
    compare(tmp_path / "out", lambda f, _: eagle_logits(tensors, f, decoupled=True))


@has("vispec")
def test_vispec(tmp_path: Path):
    tensors, config = vispec(), {**CONFIG, "num_key_value_heads": KV}
    made = convert(publish(tmp_path / "in", tensors, config), "auto", llava(), tmp_path / "out")
    assert (made.kind, made.config.n_queries) == ("vispec", 3)
    compare(tmp_path / "out", lambda f, _: vispec_logits(tensors, f), behind=True)


# ---- what is refused ----


def broken(what: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Tensors, settings and layout with one flaw."""
    tensors, config, layout = eagle(), dict(CONFIG), "eagle"
    three = {**CONFIG, "draft_vocab_size": len(IDS)}
    if what == "missing":
        del tensors["layers.0.mlp.up_proj.weight"]
    elif what == "extra":
        tensors["layers.1.mlp.up_proj.weight"] = drawn(2)
    elif what == "shape":
        tensors["fc.weight"] = drawn(D, D)
    elif what == "bias":
        tensors["layers.0.self_attn.q_proj.bias"] = drawn(D)
    elif what == "embeddings":
        tensors["embed_tokens.weight"] = drawn(V, D)
    elif what == "setting":
        del config["intermediate_size"]
    elif what in ("hidden_size", "vocab_size"):
        config[what] = 64
    elif what == "layers":
        config["num_hidden_layers"] = 2
    elif what == "rope":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4}
    elif what == "maps":
        tensors, config, layout = eagle3("midlayer."), three, "eagle3"
        tensors["t2d"] = ~tensors["t2d"]
    elif what == "order":
        tensors, config, layout = eagle3("midlayer."), three, "eagle3"
        tensors["d2t"] = tensors["d2t"].flip(0)
    elif what == "silence":
        tensors, config, layout = eagle3("layers.0."), {"transformer_layer_config": CONFIG}, "eagle3_speculators"
    elif what == "residual":
        tensors, layout = eagle3("layers.0."), "eagle3_speculators"
        config = {"transformer_layer_config": CONFIG, "norm_before_residual": True}
    elif what == "token_map":
        tensors, layout = spelled(medusa(2, 1, True), 1) | {"token_map": torch.arange(9)}, "auto"
    elif what == "unembedding":
        tensors = spelled(medusa(2, 1, False), 1) | {"lm_heads.0.weight": drawn(V, D)}
        config, layout = {"original_lm_head": True}, "medusa_vllm"
    elif what == "unknown":
        tensors, layout = {"something.weight": drawn(3)}, "auto"
    elif what == "layout":
        layout = "medusa"
    return tensors, config, layout


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("missing", ["no layers.0.mlp.up_proj.weight", "--layout"]),
        ("extra", ["layers.1.mlp.up_proj.weight", "no place"]),
        ("shape", ["fc.weight has shape (32, 32)", "(32, 64)"]),
        ("bias", ["layers.0.self_attn.q_proj.bias", "no biases"]),
        ("embeddings", ["embed_tokens.weight is not that of random-llava", "--target"]),
        ("setting", ["does not say 'intermediate_size'"]),
        ("hidden_size", ["hidden_size 64", "has 32"]),
        ("vocab_size", ["vocab_size 64", "has 61"]),
        ("layers", ["num_hidden_layers 2", "have 1"]),
        ("rope", ["rope_scaling 'yarn'"]),
        ("maps", ["t2d and d2t name different tokens"]),
        ("order", ["no ascending part"]),
        ("silence", ["does not say norm_before_residual"]),
        ("residual", ["norm_before_residual=true"]),
        ("token_map", ["token_map", "whole vocabulary"]),
        ("unembedding", ["lm_heads.0.weight is not that of random-llava"]),
        ("unknown", ["no known layout", "something.weight", "eagle3_speculators"]),
        ("layout", ["no residual block of a medusa head"]),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, what: str, said: list[str]):
    tensors, config, layout = broken(what)
    with pytest.raises(InputError) as error:
        convert(publish(tmp_path / "in", tensors, config), layout, llava(), tmp_path / "out")
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_pickles_are_not_read(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(eagle(), folder / "pytorch_model.bin")
    for place in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle.*save_file"):
            convert(place, "auto", llava(), tmp_path / "out")


def test_links_and_remote_code_are_refused(tmp_path: Path):
    """As everything of `mmspec/safety.py`, of which these two show that it is asked."""
    folder = publish(tmp_path / "in", eagle(), CONFIG | {"auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(InputError, match="remote code"):
        convert(folder, "auto", llava(), tmp_path / "out")
    publish(folder, eagle(), CONFIG)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(InputError, match="symlink"):
        convert(folder, "auto", llava(), tmp_path / "out")


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").mkdir()
    publish(tmp_path / "whole", eagle(), CONFIG)
    (tmp_path / "cut" / "m.safetensors").write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes()[:500])
    publish(tmp_path / "json", eagle(), None)
    (tmp_path / "json" / "config.json").write_text("[1")
    for name, said in (
        ("none", "does not exist"),
        ("empty", "no *.safetensors"),
        ("cut", "damaged"),
        ("json", "damaged"),
    ):
        with pytest.raises(InputError) as error:
            convert(tmp_path / name, "auto", llava(), tmp_path / "out")
        assert said in str(error.value)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_target(tmp_path / "target")
    tensors = eagle() | {"embed_tokens.weight": llava(dtype="float32").embed(torch.arange(V))}
    publish(tmp_path / "in", {name: tensor.float() for name, tensor in tensors.items()}, CONFIG)
    words = ["--target", str(tmp_path / "target"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert script.main([str(tmp_path / "in"), *words]) == 0
    assert "eagle head for target" in capsys.readouterr().out
    assert load(tmp_path / "out").kind == "eagle"
    for wrong, said in (
        ([str(tmp_path / "in"), *words], "is there already"),
        ([str(tmp_path / "in"), *words, "--layout", "eagel"], "invalid choice"),
        ([str(tmp_path / "none"), *words[:3], str(tmp_path / "other")], "does not exist"),
    ):
        assert script.main(wrong) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()) == 1


def test_a_conversion_that_was_cut_short_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weights without a tree would be refused from then on, as something that is there already."""
    save_target(tmp_path / "target")
    tensors = eagle() | {"embed_tokens.weight": llava(dtype="float32").embed(torch.arange(V))}
    publish(tmp_path / "in", {name: tensor.float() for name, tensor in tensors.items()}, CONFIG)
    words = [str(tmp_path / "in"), "--target", str(tmp_path / "target"), "--out", str(tmp_path / "out")]

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmspec.checkpoint.save_tree", cut)
        with pytest.raises(KeyboardInterrupt):
            script.main([*words, "--device", "cpu"])
    assert not (tmp_path / "out").exists()
    (tmp_path / ".out.part").mkdir()  # as one that was killed leaves it
    (tmp_path / ".out.part" / "static_tree.json").write_text("{}")
    assert script.main([*words, "--device", "cpu"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "target"]
    assert not (tmp_path / "out" / "static_tree.json").exists()
