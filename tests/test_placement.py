"""Placed and quantised targets: the same states and tokens wherever the weights live, and few of them on the device."""

from __future__ import annotations

import copy
import importlib.util
import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.recipe import load as load_recipe
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.targets._quantize import LIBRARIES
from mmspec.targets.base import HFTarget
from mmspec.types import InputError
from tests import families, tiny
from tests.test_train_runs import wait_for, workers
from tests.training import (
    ROOT,
    distill,
    end,
    environment,
    launched,
    losses,
    prepare,
    record,
    save_data,
    save_recipe,
    save_target,
    session,
    start,
)
from train import placement
from train.extract import origin
from train.features import check_origin
from train.placement import ALIGNMENT, Host, Layers, Shares
from train.regenerate import answers_key
from train.world import World, free_port

CPU = torch.device("cpu")


class Counted(Host):
    """Host memory that notes which layers were asked for."""

    def __init__(self, device: torch.device = CPU) -> None:
        super().__init__(device)
        self.asked: list[int] = []

    def fetch(self, index: int, into: Tensor) -> Callable[[], Any]:
        self.asked.append(index)
        return super().fetch(index, into)


def streamed(target: HFTarget, store: placement.Store, device: torch.device = CPU) -> tuple[HFTarget, Layers]:
    """A copy of a target whose layers live in a store."""
    model = copy.deepcopy(target.model)
    layers = Layers(model.model.language_model, store, device)
    return type(target)(model.to(device), target.processor, target.name), layers


@pytest.mark.parametrize("family", families.FAMILIES)
def test_states_and_tokens_do_not_depend_on_where_layers_live(family: str):
    """Tapped states, visual attention and deep image features go through the same modules; all must be bit-equal."""
    whole = families.build(family)
    away, _ = streamed(whole, Host(CPU))
    assert away.fingerprint == whole.fingerprint
    prompts = [families.prompt(whole, seed, layout) for seed, layout in ((0, "first"), (1, "none"))]
    marks = [torch.zeros(len(prompt), dtype=torch.long) for prompt in prompts]
    a, b = (t.teacher(prompts, marks, (0, 1, whole.shape.n_layers), mass_layers=(1,)) for t in (whole, away))
    assert torch.equal(a.last_hidden, b.last_hidden)
    assert all(torch.equal(a.hidden[tap], b.hidden[tap]) for tap in a.hidden)
    assert a.visual_mass is not None
    assert torch.equal(a.visual_mass, b.visual_mass)
    assert texts(whole) == texts(away)


def texts(target: HFTarget) -> list[Any]:
    outputs = generate(
        target, families.requests(target, 3, 6), NullDrafter(), SkipPolicy(), GreedySampler(), max_batch=2
    )
    assert not any(output.error for output in outputs)
    return [output.tokens for output in outputs]


def test_one_layer_has_its_weights_and_the_next_is_on_its_way():
    store = Counted()
    target, layers = streamed(tiny.llava(), store)
    seen: list[tuple[list[int], list[int]]] = []
    for layer in target.text_model.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append((layers.present, list(store.asked))))
    assert layers.present == []
    prompt = tiny.prompt(target, 0)
    target.teacher([prompt], [torch.zeros(len(prompt), dtype=torch.long)])
    assert seen == [([0], [0, 1]), ([1], [0, 1, 2]), ([2], [0, 1, 2])]
    assert layers.present == []
    assert placement.resident_bytes(target) == 0
    assert layers._buffers is None


def test_a_pass_that_breaks_off_fetches_the_rest_and_the_next_one_is_right():
    store = Counted()
    whole = tiny.llava()
    target, layers = streamed(whole, store)
    prompt = tiny.prompt(target, 0)
    marks = [torch.zeros(len(prompt), dtype=torch.long)]

    def fail(*_: Any) -> None:
        raise ValueError("broken")

    handle = target.text_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        target.teacher([prompt], marks)
    handle.remove()
    assert store.asked == [0, 1, 2]
    assert layers.present == []
    assert torch.equal(target.teacher([prompt], marks).last_hidden, whole.teacher([prompt], marks).last_hidden)


def test_a_layer_out_of_its_turn_is_refused():
    target, _ = streamed(tiny.llava(), Host(CPU))
    with pytest.raises(RuntimeError, match="layer 1 was called outside its turn"):
        target.text_model.layers[1](torch.zeros(1, 2, 32))


def test_a_lent_layer_has_its_weights_for_as_long():
    whole = tiny.llava()
    target, layers = streamed(whole, Host(CPU))
    placement._HOOKED[target] = layers
    with placement.lend(target, 2) as module:
        for name, weight in whole.text_model.layers[2].named_parameters():
            assert torch.equal(module.get_parameter(name), weight), name
    assert layers.present == []


def test_weights_of_several_dtypes_are_packed_and_found_again():
    layer = nn.Sequential(nn.Linear(3, 5).bfloat16(), nn.LayerNorm(5), nn.Linear(5, 2, bias=False).double())
    wanted = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    weights, packed = placement._pack(layer)
    assert all(weight.start % ALIGNMENT == 0 for weight in weights)
    for weight in weights:
        weight.drop()
        weight.take(packed)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {name: t.dtype for name, t in wanted.items()}
    assert all(torch.equal(p, wanted[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize("size", [2, 3])
def test_shares_add_up_to_the_layer_and_each_rank_keeps_its_part_alone(size: int):
    packed = torch.arange(5000).remainder(251).to(torch.uint8)
    stores = [Shares(World(rank, size, CPU, None), None) for rank in range(size)]
    filled = {store.add(packed) for store in stores}
    together = torch.cat([store.shares[0] for store in stores])
    assert filled == {len(together)}
    assert torch.equal(together[:5000], packed)
    assert not together[5000:].any()
    assert {store.device_bytes for store in stores} == {len(together) // size}
    assert len(together) < 5000 + size * ALIGNMENT


def _two(rank: int, port: int, folder: str) -> None:
    """One of two ranks: rank 0 makes three passes, rank 1 one that breaks off, and then its block raises."""
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    whole = tiny.llava()
    target, layers = streamed(whole, Shares(World(rank, 2, CPU, None), dist.new_group()))
    full = sum(p.untyped_storage().nbytes() for p in whole.text_model.layers.parameters())
    held = layers.store.device_bytes + sum(p.untyped_storage().nbytes() for p in target.text_model.layers.parameters())
    prompt = tiny.prompt(target, rank)
    marks = [torch.zeros(len(prompt), dtype=torch.long)]
    passes = []
    try:
        with layers.uneven():
            for number in range(3 if rank == 0 else 1):
                if rank == 1:
                    target.text_model.layers[1].register_forward_pre_hook(_fail)
                last = target.teacher([prompt], marks).last_hidden
                passes.append(torch.equal(last, whole.teacher([prompt], marks).last_hidden))
                assert number < 3
    except ValueError as error:
        passes.append(str(error))
    Path(folder, f"{rank}.json").write_text(json.dumps([passes, held / full]))
    dist.destroy_process_group()


def _fail(*_: Any) -> None:
    raise ValueError("broken")


@pytest.mark.slow
def test_ranks_may_need_different_numbers_of_passes_and_hold_half_each(tmp_path: Path):
    """Also when a rank's pass breaks off in the middle, and its block ends with that."""
    torch.multiprocessing.spawn(_two, (free_port(), str(tmp_path)), nprocs=2)
    (first, held0), (second, held1) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == [True, True, True]
    assert second == ["broken"]
    # A layer of this target is so small that the gaps between its weights count.
    assert held0 == held1
    assert 0.5 <= held0 < 0.55


@pytest.mark.gpu
def test_an_offloaded_target_on_a_gpu_computes_the_same_and_holds_two_layers_at_a_time():
    device = torch.device("cuda")
    whole = tiny.llava(dtype="float32")
    store = Counted(device)
    target, layers = streamed(whole, store, device)
    assert all(packed.is_pinned() for packed in store.packed)
    there = type(whole)(copy.deepcopy(whole.model).to(device), whole.processor, "there")
    prompt = tiny.prompt(target, 0)
    marks = [torch.zeros(len(prompt), dtype=torch.long)]
    for _ in range(20):
        a, b = (t.teacher([prompt], marks).last_hidden for t in (there, target))
        assert torch.equal(a, b)
    assert placement.resident_bytes(target) == 0
    assert layers._buffers is None


# ---- the recipe ----


def test_placement_and_quantisation_are_checked(tmp_path: Path):
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", "synth:train", tmp_path)
    for override, said in (
        ("target.placement=shared", "did you mean 'sharded'"),
        ("target.quantize=8bits", "did you mean '8bit'"),
    ):
        with pytest.raises(InputError, match=said):
            load_recipe(path, [override])
    with pytest.raises(InputError, match=r"goes with target\.placement=replicated alone"):
        load_recipe(path, ["target.quantize=4bit", "target.placement=offloaded"])


def test_answers_and_features_belong_to_a_quantisation_but_to_no_placement(tmp_path: Path):
    s = session(tmp_path, [record(0), record(1)])
    prepare(s)
    key, made = answers_key(s.recipe, s.corpus, s.target), origin(s.recipe, s.corpus, s.target)
    s.recipe.target.placement = "offloaded"
    assert answers_key(s.recipe, s.corpus, s.target) == key
    assert origin(s.recipe, s.corpus, s.target) == made
    s.recipe.target.quantize = "8bit"
    assert answers_key(s.recipe, s.corpus, s.target) != key
    with pytest.raises(InputError, match="target dtype float32, but the recipe has target dtype float32 8bit"):
        check_origin(tmp_path, made, origin(s.recipe, s.corpus, s.target))


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_missing_library_is_named(kind: str):
    if importlib.util.find_spec(LIBRARIES[kind]) is not None:
        pytest.skip(f"{LIBRARIES[kind]} is installed")
    with pytest.raises(InputError, match=f"pip install {LIBRARIES[kind]}"):
        load_target("tiny_llava", quantize=kind)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_quantised_row_has_its_logits_whoever_stands_beside_it(kind: str):
    pytest.importorskip(LIBRARIES[kind], reason=f"{kind} targets need {LIBRARIES[kind]}")
    whole, small = load_target("tiny_llava"), load_target("tiny_llava", quantize=kind)
    assert small.fingerprint == whole.fingerprint
    assert {p.dtype for p in small.model.model.vision_tower.parameters()} == {torch.float32}
    tokens = torch.randint(0, 500, (6, 40), generator=torch.Generator().manual_seed(0))

    def logits(target: HFTarget, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return target.unembed(target._text(target.embed(ids), torch.arange(40).unsqueeze(0), None, None))

    together = logits(small, tokens)
    alone = torch.cat([logits(small, row.unsqueeze(0)) for row in tokens])
    # LLM.int8(), whose outlier columns are those of the whole pass, differs by 0.39 here.
    assert torch.allclose(together, alone, atol=1e-4)
    plain = logits(whole, tokens)
    error = (together - plain).norm() / plain.norm()
    assert 1e-3 < error < 0.2


# ---- real runs ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("placed")
    save_target(folder / "target")
    # An odd number of records and of held-out prompts: the ranks' shares of the decoding differ.
    data = save_data(folder, [record(number, turns=1 + number % 2) for number in range(23)])
    save_recipe(folder / "r.yaml", folder / "target", data, folder / "out", max_steps=8, eval_every=4, eval_prompts=3)
    return folder


def words(base: Path, name: str, *more: str) -> list[str]:
    return [str(base / "r.yaml"), f"run.name={name}", "optim.micro_batch=2", "policy.rollouts=7", *more]


@pytest.fixture(scope="module")
def replicated(base: Path) -> Path:
    done = distill(2, *words(base, "replicated", "policy.kind=learned"))
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "out" / "replicated"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["sharded", "offloaded"])
def test_a_run_is_the_same_wherever_the_target_lives(base: Path, replicated: Path, where: str):
    """Answers, training, measured tau, rollout and controller, each rank with work of its own."""
    done = distill(2, *words(base, where, "policy.kind=learned", f"target.placement={where}"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"target: {where}; " in done.stdout
    folder = base / "out" / where
    for key in ("train/loss", "accept/tau", "viskip/loss"):
        assert losses(folder, key) == losses(replicated, key), key
        assert losses(folder, key)
    mine, theirs = (next(path.glob("answers/*/answers.jsonl")).read_text() for path in (folder, replicated))
    assert mine == theirs


@pytest.mark.slow
def test_features_of_a_sharded_target_are_those_of_a_whole_one(base: Path):
    digests = []
    for where in ("replicated", "sharded"):
        out = base / f"features_{where}"
        command = launched(2, ROOT / "scripts" / "extract_features.py", base / "r.yaml", "--out", out)
        more = [f"target.placement={where}", f"run.name=x{where}", "--shard-tokens", "60"]
        done = subprocess.run([*command, *more], cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        digests.append([shard["sha256"] for shard in json.loads((out / "manifest.json").read_text())["shards"]])
    assert len(digests[0]) > 2
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_sigterm_ends_a_sharded_run_while_it_decodes(base: Path):
    data = save_data(base / "long", [record(number) for number in range(400)])
    more = (f"data.train={data}", "target.placement=sharded", "data.max_new_tokens=64")
    with (base / "stop.log").open("a") as log:
        process = start(2, *words(base, "stop", *more), stdout=log, stderr=log)
    try:
        folder = base / "out" / "stop"
        while not list(folder.glob("answers/*/part-0.jsonl")):
            assert process.poll() is None, (base / "stop.log").read_text()[-3000:]
        wait_for(next(folder.glob("answers/*/part-0.jsonl")), process)
        alive = workers(process)
        process.send_signal(signal.SIGTERM)
        assert not psutil.wait_procs(alive, timeout=40)[1]
    finally:
        end(process)
    said = (base / "stop.log").read_text()
    assert said.count("the same command with run.resume=true goes on") == 1
    assert "Traceback" not in said
