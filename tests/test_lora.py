"""Adapters on a head: what is saved computes what was trained, and nothing else moves; heads that begin as a layer."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from mmspec import checkpoint
from mmspec.heads import eagle, eagle3
from mmspec.loop import generate
from mmspec.losses import LossConfig
from mmspec.nn import RotaryTable, attend
from mmspec.policy import FixedPolicy
from mmspec.recipe import HeadNode, Lora
from mmspec.sampling import GreedySampler
from mmspec.types import InputError, Plan, Request
from tests import families
from tests.contract.test_heads import dialogue, taught
from tests.drafters import HEADS, make_head
from tests.tiny import llava, prompt
from tests.training import TIMEOUT_S, distill, end, losses, record, save_data, save_recipe, save_target, start
from train.lora import adapt, adapted_layers, merged, save_adapters

every_head = pytest.mark.parametrize("kind", HEADS)


def node(kind: str, **lora) -> HeadNode:
    """Adapters on every linear layer of a head of that kind, its own unembedding included."""
    own = ["lm_head"] if kind.startswith("eagle3") else []
    lora = {"rank": 3, "alpha": 7.0, "modules": [*Lora().modules, *own], **lora}
    return HeadNode(kind.partition("_")[0], "runs/base", None, None, Lora(**lora))


def adapted(kind: str, **lora):
    """A head, the same with adapters that do something, and the node that says which."""
    plain = make_head(kind, llava())
    head, said = copy.deepcopy(plain), node(kind, **lora)
    adapt(head, said)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return plain, head, said


# ---- the law: merged is adapted ----


@every_head
def test_merged_weights_are_base_plus_scaled_product(kind: str):
    plain, head, said = adapted(kind)
    whole = merged(head.state_dict(), copy.deepcopy(plain), said)
    base, state = plain.state_dict(), head.state_dict()
    assert list(whole) == list(base)
    for name in base:
        layer = name.removesuffix(".weight")
        change = torch.zeros_like(base[name])
        if f"{layer}.lora_A.default.weight" in state:
            down, up = state[f"{layer}.lora_A.default.weight"], state[f"{layer}.lora_B.default.weight"]
            change = 7.0 / 3 * (up @ down)
            assert change.abs().max() > 0.01
        assert torch.allclose(whole[name], base[name] + change, atol=1e-14, rtol=1e-14), name


@every_head
def test_the_merged_head_has_the_loss_of_the_adapted_one(kind: str):
    """And its acceptance, along the unrolled steps of training (fp64, 1e-9)."""
    target = llava()
    plain, head, said = adapted(kind)
    whole = copy.deepcopy(plain)
    whole.load_state_dict(merged(head.state_dict(), copy.deepcopy(plain), said))
    features = taught(target, plain, [dialogue(target, 2), dialogue(target, 1)])
    wanted, got, before = (one(features, target.unembed) for one in (head, whole, plain))
    assert got.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-9)
    assert abs(before.loss.item() - wanted.loss.item()) > 1e-3
    for name in wanted.sums:
        assert got.sums[name].item() == pytest.approx(wanted.sums[name].item(), rel=1e-9), name


@every_head
def test_drafting_with_the_merged_head_is_drafting_with_the_adapted_one(kind: str):
    """Every candidate, parent and score of the dynamic tree (fp64, 1e-9), and the rounds of a decoded text."""
    target = llava()
    plain, head, said = adapted(kind)
    whole = copy.deepcopy(plain)
    whole.load_state_dict(merged(head.state_dict(), copy.deepcopy(plain), said))
    request, pools, rounds = Request("r", prompt(target, 4), 12), [], []
    for one in (head, whole, plain):
        one = copy.deepcopy(one).eval().requires_grad_(False)
        with torch.inference_mode():
            drafter = one.drafter(target, 3)
            drafter.open(1, 64)
            forward = target.prefill(target.open(1, 64), 0, request.prompt, one.taps)
            root = forward.logits[0, -1].argmax()
            drafter.admit(0, request, forward, root)
            drafter._take_in(keep_last=False)
            pools.append(drafter._expand(root.reshape(1), drafter._root_state(), Plan(4, (9,))))
        output = generate(target, [request], one.drafter(target, 3), FixedPolicy(4, 8), GreedySampler())[0]
        rounds.append((output.tokens, output.rounds))
    assert torch.equal(pools[0][0], pools[1][0])
    assert torch.equal(pools[0][1], pools[1][1])
    assert torch.allclose(pools[0][2], pools[1][2], atol=1e-9, rtol=0)
    assert not torch.allclose(pools[0][2], pools[2][2], atol=1e-3), "the adapters were not looked at"
    assert rounds[0] == rounds[1]


@every_head
def test_only_adapters_have_gradients_and_a_step_leaves_the_base_alone(kind: str):
    target = llava()
    plain, head, said = adapted(kind)
    trained = [p for p in head.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sum(
        said.lora.rank * (layer.in_features + layer.out_features) for layer in adapted_layers(plain, said).values()
    )
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    head(taught(target, plain, [dialogue(target, 2)]), target.unembed).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    optimizer.step()
    state = head.state_dict()
    for name, tensor in plain.state_dict().items():
        layer, _, what = name.rpartition(".")
        kept = state[name] if name in state else state[f"{layer}.base_layer.{what}"]
        assert torch.equal(kept, tensor), name


@every_head
def test_fresh_adapters_change_nothing(kind: str):
    plain = make_head(kind, llava())
    head = copy.deepcopy(plain)
    adapt(head, node(kind))
    whole = merged(head.state_dict(), copy.deepcopy(plain), node(kind))
    assert all(torch.equal(whole[name], tensor) for name, tensor in plain.state_dict().items())


def test_merging_half_precision_rounds_once():
    plain, head, said = adapted("eagle")
    head.bfloat16()
    state = head.state_dict()
    whole = merged(state, eagle.Head(plain.config), said)
    down, up = (state[f"fc.lora_{x}.default.weight"].float() for x in "AB")
    exact = state["fc.base_layer.weight"].float() + 7.0 / 3 * (up @ down)
    assert whole["fc.weight"].dtype == torch.bfloat16
    assert torch.equal(whole["fc.weight"], exact.bfloat16())


@every_head
def test_the_saved_adapters_are_pefts_and_merge_to_the_saved_head(kind: str, tmp_path: Path):
    """By peft alone: whoever has the base and the two small files has the adapted head."""
    plain, head, said = adapted(kind)
    save_adapters(tmp_path, head.state_dict(), copy.deepcopy(plain), said, "fingerprint")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "runs/base"
    whole = merged(head.state_dict(), copy.deepcopy(plain), said)
    back = peft.PeftModel.from_pretrained(plain, str(tmp_path)).merge_and_unload().state_dict()
    assert list(back) == list(whole)
    assert all(torch.equal(back[name], whole[name]) for name in whole)


def test_a_layer_that_the_head_has_not_is_named():
    with pytest.raises(InputError, match=r"'lm_head', which a eagle head has not; it has: .*q_proj"):
        adapted_layers(make_head("eagle", llava()), node("eagle", modules=["q_proj", "lm_head"]))


# ---- heads that begin as a layer of the target ----


def layer_output(target, index: int, states: torch.Tensor) -> torch.Tensor:
    """What the target's own layer makes of states [1, T, D], causally."""
    positions = torch.arange(states.shape[1]).unsqueeze(0)
    rope = target.text_model.rotary_emb(states, positions)
    out = target.text_model.layers[index](states, position_embeddings=rope, position_ids=positions)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("shape", ["grouped", "wide_heads"])
@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_block_that_took_a_layer_computes_what_the_layer_does(family: str, shape: str, kind: str):
    """The paired block too, whatever the embeddings: it is the layer over its states.

    To 1e-5 of the largest: transformers forms norms and rotations in fp32 whatever the weights are.
    """
    target = families.build(family, **families.SHAPES[shape])
    if kind == "eagle":
        head = eagle.Head(eagle.Config(input_norm=True).resolve(target.shape)).double()
    else:
        head = eagle3.Head(eagle3.Config().resolve(target.shape)).double()
    head.take_layer(target, 1)
    generator = torch.Generator().manual_seed(0)
    states, embeds = torch.randn(2, 1, 7, target.shape.hidden_size, generator=generator, dtype=torch.float64)
    entered = states if kind == "eagle" else torch.cat([embeds, states], -1)
    rope = RotaryTable(head.config.head_dim, head.config.rope_theta).at(torch.arange(7).unsqueeze(0), 7, states.dtype)
    with torch.no_grad():
        got = head.block(entered, rope, lambda q, k, v: attend(q, k, v, causal=True))
        wanted, other = (layer_output(target, index, states) for index in (1, 0))
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (got - other).abs().max() > 1e-2 * wanted.abs().max()


@pytest.mark.parametrize(
    ("family", "said"),
    [("qwen2_vl", "bias"), ("qwen2_5_vl", "bias"), ("qwen3_vl", "norm")],
)
def test_a_layer_that_holds_more_than_the_block_is_refused_in_one_line(family: str, said: str):
    target = families.build(family)
    head = eagle3.Head(eagle3.Config(rope_theta=target.shape.rope_theta).resolve(target.shape))
    with pytest.raises(InputError, match=rf"head\.init_layer=-1 of .*self_attn\..*{said}.*no place") as error:
        head.take_layer(target, -1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "index", "said"),
    [
        ({}, 0, r"set head\.input_norm=true"),
        ({"input_norm": True, "rope_theta": 5.0}, 0, r"set head\.rope_theta=10000"),
        ({"input_norm": True, "intermediate_size": 20}, 0, r"mlp\.down_proj has shape \(32, 48\).*\(32, 20\)"),
        ({"input_norm": True}, 3, r"layer 3 is outside 0\.\.2"),
    ],
)
def test_a_head_of_another_shape_is_refused_in_one_line(config: dict, index: int, said: str):
    target = llava()
    with pytest.raises(InputError, match=said):
        eagle.Head(eagle.Config(**config).resolve(target.shape)).take_layer(target, index)


def test_on_top_of_a_layer_the_block_is_adapted_and_the_rest_is_trained():
    target = llava()
    head = eagle3.Head(eagle3.Config().resolve(target.shape), LossConfig()).double()
    head.take_layer(target, 1)
    said = HeadNode("eagle3", None, None, 1, Lora(rank=2))
    adapt(head, said)
    frozen = {name for name, parameter in head.named_parameters() if not parameter.requires_grad}
    matrices = {f"block.{n}_proj.base_layer.weight" for n in "qkvo"}
    matrices |= {f"block.mlp.{n}_proj.base_layer.weight" for n in ("gate", "up", "down")}
    assert frozen == matrices
    assert not any("fc.lora" in name for name, _ in head.named_parameters())


# ---- real runs ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, train_here: Callable[..., None]) -> Path:
    """A folder with target, data, recipe, and a head trained for a few steps, `out/base`."""
    folder = tmp_path_factory.mktemp("lora")
    save_target(folder / "target")
    data = save_data(folder, [{**record(n, turns=1 + n % 2), "topic": "ab"[n % 2]} for n in range(16)])
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=8)
    train_here(*words(folder, "base"))
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    return [str(base / "r.yaml"), f"run.name={name}", f"data.answers_dir={base / 'answers'}", *more]


def lora_words(base: Path, name: str, *more: str) -> list[str]:
    return words(base, name, f"head.init_from={base / 'out' / 'base'}", "head.lora.rank=4", "optim.lr=1e-2", *more)


@pytest.fixture(scope="module")
def alone(base: Path, train_here: Callable[..., None]) -> Path:
    train_here(*lora_words(base, "alone"))
    return base / "out" / "alone"


def test_a_run_leaves_a_plain_head_and_the_adapters_beside_it(base: Path, alone: Path):
    start, end = (load_file(folder / "head.safetensors") for folder in (base / "out" / "base", alone))
    assert list(start) == list(end)
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert same == {"fc.bias", "block.post_attention_layernorm.weight"}
    head = checkpoint.load(alone).head()
    assert type(head) is eagle.Head
    plain = checkpoint.load(base / "out" / "base").head()
    back = peft.PeftModel.from_pretrained(plain, str(alone)).merge_and_unload().state_dict()
    for name, tensor in head.state_dict().items():
        assert torch.allclose(back[name], tensor, atol=1e-6), name
    curve = list(losses(alone).values())
    assert curve[-1] < curve[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_adapters_give_one_curve_at_every_stage(base: Path, alone: Path, zero: int):
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = ["optim.micro_batch=2", f"deepspeed.zero_stage={zero}"]
    more += [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
    done = distill(2, *lora_words(base, f"zero{zero}", *more))
    assert done.returncode == 0, done.stderr[-3000:]
    folder = base / "out" / f"zero{zero}"
    first, second = losses(alone), losses(folder)
    assert list(first) == list(second)
    assert all(first[step] == pytest.approx(second[step], abs=1e-3) for step in first)
    heads = [load_file(place / "head.safetensors") for place in (alone, folder)]
    assert all(torch.allclose(heads[0][name], heads[1][name], atol=1e-3) for name in heads[0])
    # Two held-out prompts, one of each topic: what each rank decoded is known to both.
    assert losses(folder, "accept/tau/a") == losses(alone, "accept/tau/a") != {}
    assert losses(folder, "accept/tau/b") == losses(alone, "accept/tau/b") != {}


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 3])
def test_an_unembedding_of_its_own_and_a_layer_of_the_target_train_at_every_stage(base: Path, zero: int):
    """EAGLE-3 that begins as the target's layer, then adapters on all of that, W_d included."""
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    kind = ["head.kind=eagle3", "head.draft_vocab_size=40", "optim.lr=1e-2"]
    every = "head.lora.modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,fc,lm_head]"
    curves = []
    for procs in (0, 2):
        more = [*kind, "optim.micro_batch=4"]
        if procs:
            more = [*kind, "optim.micro_batch=2", f"deepspeed.zero_stage={zero}"]
            more += [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
        first, second = f"layer{procs}z{zero}", f"adapted{procs}z{zero}"
        beginnings = {
            first: ["head.init_layer=-1", "head.lora.rank=2"],
            second: [f"head.init_from={base / 'out' / first}", "head.lora.rank=2", every],
        }
        for name, beginning in beginnings.items():
            done = distill(procs, *words(base, name, *more, *beginning))
            assert done.returncode == 0, done.stderr[-3000:]
        curves.append([*losses(base / "out" / first).values(), *losses(base / "out" / second).values()])
        assert not (base / "out" / first / "adapter_config.json").exists()
    assert len(curves[0]) == 16
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 3])
def test_a_stopped_adaptation_goes_on_to_the_same_head(base: Path, zero: int):
    """State of two steps of eight, then the rest, against a run that was left alone."""
    (base / "z3.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    more = ["optim.micro_batch=2", "optim.schedule=constant", "run.save_every=2", f"deepspeed.zero_stage={zero}"]
    more += [f"deepspeed.config={base / 'z3.json'}"] if zero == 3 else []
    whole, cut = (base / "out" / f"{name}{zero}" for name in ("whole", "cut"))
    assert distill(2, *lora_words(base, whole.name, *more)).returncode == 0
    process = _until_saved(lora_words(base, cut.name, *more, "run.max_steps=8"), cut)
    assert process != 0
    done = distill(2, *lora_words(base, cut.name, *more, "run.resume=true"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at head step" in done.stdout
    for name in ("head.safetensors", "adapter_model.safetensors"):
        first, second = load_file(whole / name), load_file(cut / name)
        assert list(first) == list(second)
        assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first), name


def _until_saved(said: list[str], folder: Path) -> int:
    """Starts a run on two processes and kills it once it has saved state; returns its exit code."""
    process = start(2, *said)
    try:
        limit = time.monotonic() + TIMEOUT_S
        while not any((folder / "state" / "head").glob("step-[0-9]*[0-9]/manifest.json")):
            assert process.poll() is None, "the run ended too early"
            assert time.monotonic() < limit
            time.sleep(0.01)
    finally:
        end(process)
    return process.wait()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["head.init_from=nowhere"], "head.init_from: checkpoint nowhere does not exist"),
        (["head.init_from=BASE", "head.kind=eagle3"], "holds a eagle head, not head.kind=eagle3"),
        (["head.init_from=BASE", "head.rope_theta=5"], "set head.rope_theta=10000"),
        (["head.init_from=BASE", "head.lora.rank=2", "head.lora.modules=[lm_head]"], "'lm_head'"),
        (["head.init_layer=7", "head.input_norm=true"], "outside 0..2"),
    ],
)
def test_a_beginning_that_cannot_be_is_one_line_and_code_2(
    base: Path, more: list[str], said: str, train_here: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    train_here(*words(base, "wrong", *(word.replace("BASE", str(base / "out" / "base")) for word in more)), code=2)
    error = capsys.readouterr().err
    assert error.count("distill: error: ") == 1
    assert error.splitlines()[-1].startswith("distill: error: ")
    assert said in error
