"""What a run writes down: rates, memory and acceptance by topic against hand computation, and who is told."""

from __future__ import annotations

import importlib.util
import json
import mmap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mmspec.heads import eagle, eagle3
from mmspec.loop import generate
from mmspec.losses import LossConfig
from mmspec.policy import FixedPolicy
from mmspec.recipe import HeadNode, Lora, Source
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.types import InputError, TargetShape
from tests.contract.test_heads import dialogue, taught
from tests.drafters import HEADS, make_head
from tests.tiny import llava
from tests.training import distill, prepare, record, save_data, save_recipe, save_target, session
from train import tracking
from train.corpus import read
from train.encode import encode
from train.flops import Work, counted, expected, head_cost, target_cost
from train.lora import adapt
from train.measure import held_out, measure
from train.tracking import Tracker
from train.usage import memory_gb, named_peak, peak_tflops

SHAPE = TargetShape(
    hidden_size=8, intermediate_size=20, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=2, vocab_size=50,
    rms_eps=1e-6, rope_theta=1e4,
)  # fmt: skip


# ---- operations, by hand ----


def test_the_targets_pass_by_hand():
    """A layer: q and o 8 x 8, k and v 8 x 4, gate, up and down 8 x 20; attention 4 heads of 2, both of its products."""
    weights = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 20
    work = Work(tokens=10, pairs=55, drafts=3, draft_pairs=7, predictions=6)
    assert target_cost(SHAPE).of(work) == 3 * (2 * weights * 10 + 2 * 2 * 8 * 55)


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_heads_step_by_hand(kind: str):
    """10 tokens, 3 draft positions that see 7 tokens together, 2 steps, 5 predictions."""
    work, loss = Work(tokens=10, pairs=0, drafts=3, draft_pairs=7, predictions=5), LossConfig(steps=2)
    attention = 3 * (2 * 2 * 8) * (2 * 7 + 3)
    inner = 3 * 2 * 3 * 2 * (8 * 20 * 3 + 8 * 8)  # o and the MLP: three passes, 3 positions in 2 steps
    teacher = 2 * 8 * 50 * 3
    head: nn.Module
    if kind == "eagle":
        head = eagle.Head(eagle.Config().resolve(SHAPE), loss)
        fc = 2 * 16 * 8 * (2 * 10 + 3 * 3)  # what step 0 reads needs no gradient
        rest = 3 * 2 * 8 * 8 * 3 * 2 + 3 * 2 * 2 * (8 * 4) * (10 + 3) + 2 * 2 * 8 * 50 * 5
    else:
        head = eagle3.Head(eagle3.Config(draft_vocab_size=30, taps=(0, 1, 2)).resolve(SHAPE), loss)
        fc = 2 * 24 * 8 * 2 * 10
        rest = 3 * 2 * 16 * 8 * 3 * 2 + 3 * 2 * 2 * (16 * 4) * (10 + 3) + 3 * 2 * 8 * 30 * 5
    assert head_cost(head, SHAPE, 2).of(work) == attention + inner + teacher + fc + rest


def test_a_frozen_layer_under_an_adapter_has_one_gradient_less():
    head, work = eagle.Head(eagle.Config().resolve(SHAPE)), Work(10, 55, 3, 7, 5)
    whole = head_cost(head, SHAPE, 1).of(work)
    adapt(head, HeadNode("eagle", "x", None, None, Lora(rank=1, modules=["o_proj"])))
    matrices = 3 * 8 * 20 + 8 * 8 * 2
    saved = 2 * 3 * matrices + 2 * 10 * (2 * 8 * 4 + 16 * 8)
    adapter = 3 * 2 * 3 * (8 + 8)
    assert head_cost(head, SHAPE, 1).of(work) == whole - saved + adapter


def test_counts_of_a_batch_by_hand():
    """Conversations of 8 (a reply of 4 at its end), 6 (replies of 2 and 1); one row each, then both in one row."""
    answers = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 0, 2]]
    padded = torch.tensor([answers[0], [*answers[1], 0, 0]])
    valid = torch.tensor([[1] * 8, [1] * 6 + [0] * 2]).bool()
    one = torch.tensor([answers[0] + answers[1]])
    segment = torch.tensor([[1] * 8 + [2] * 6])
    # Drafts begin at 3, 4, 5 of the first and 0 of the second, and see 4, 5, 6 and 1 tokens.
    wanted = Work(tokens=14, pairs=36 + 21, drafts=4, draft_pairs=16, predictions=4 + 2 + 1)
    for found in (counted(valid, padded, None, 3), counted(segment > 0, one, segment, 3)):
        assert {name: int(value) for name, value in vars(found).items()} == vars(wanted)
    alone = counted(valid[:1], padded[:1], None, 3)
    assert {name: int(value) for name, value in vars(alone).items()} == vars(expected(1, 8, 4, 3))


@pytest.mark.parametrize("kind", HEADS)
def test_the_count_is_that_of_the_products_that_run(kind: str):
    """Every linear layer of head and target where it is called: to 3%, as the last tokens of a text are not read."""
    target = llava()
    head = make_head(kind, target, steps=3)
    ran = [0]

    def note(module: Any, args: Any, _: Any) -> None:
        ran[0] += 2 * args[0].numel() * module.out_features

    layers = [m for m in [*head.modules(), target.lm_head] if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    features = taught(target, head, [dialogue(target, 1 + b) for b in range(2)])
    with torch.no_grad():
        objective = head(features, target.unembed)
    for handle in handles:
        handle.remove()
    work = counted(features.valid, features.answer, features.segment, 3, features.visual)
    assert int(work.drafts) == int(objective.counts["tau_sim"])
    c = head.config
    attention = 4 * c.n_heads * c.head_dim * (3 * work.draft_pairs + 3 * work.drafts)
    wanted = head_cost(head, target.shape, 3, backward=False).of(work) - attention
    assert ran[0] == pytest.approx(float(wanted), rel=0.03)


# ---- the device ----


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA T400", None),
    ],
)
def test_a_peak_is_looked_up_by_whole_words(name: str, peak: float | None):
    assert named_peak(name) == peak


def test_a_cpu_has_no_peak_but_the_given_one():
    assert peak_tflops(torch.device("cpu"), "bfloat16", None) is None
    assert peak_tflops(torch.device("cpu"), "float32", 0.5) == 0.5


def test_memory_is_the_peak_and_not_what_is_left():
    Path("/proc/self/clear_refs").write_text("5")  # the peak of earlier tests in this process
    before = memory_gb(torch.device("cpu"))
    with mmap.mmap(-1, 100_000_000) as held:  # of the system's: the heap may have as much to give from earlier tests
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    assert before + 0.05 < memory_gb(torch.device("cpu")) < before + 0.25


# ---- acceptance by topic ----


def with_topic(number: int, **more: str) -> dict[str, Any]:
    return {**record(number), **more}


def test_a_record_has_its_topic_or_its_category(tmp_path: Path):
    records = [
        with_topic(0, topic="a", category="x"),
        with_topic(1, category="y"),
        with_topic(2),
        with_topic(3, topic=""),
    ]
    corpus = session(tmp_path, records).corpus
    assert [sample.topic for sample in corpus.samples] == ["a", "y", "", ""]


def test_a_source_may_be_one_topic_of_its_first_records(tmp_path: Path):
    data = save_data(tmp_path, [with_topic(n, topic="ab"[n % 2]) for n in range(6)] + [3])
    quarantine = Quarantine(None)
    corpus = read([Source(str(data), limit=5, topic="b")], quarantine)
    assert [(sample.id, sample.line) for sample in corpus.samples] == [("r1", 2), ("r3", 4)]
    assert corpus.n_read == 2
    assert quarantine.count == 0
    with pytest.raises(InputError, match=r"no record has the topic 'c'; it has: a, b"):
        read([Source(str(data), topic="c")], quarantine)


def test_synthetic_conversations_keep_their_topic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mmspec.synth.lexicon import TOPICS

    monkeypatch.setenv("MMSPEC_CACHE", str(tmp_path))
    corpus = read([Source("synth:val", limit=6)], Quarantine(None))
    assert {sample.topic for sample in corpus.samples} == set(TOPICS)


def test_tau_by_topic_is_that_of_the_topics_own_rounds(tmp_path: Path):
    """Kept tokens after the first over rounds, of a topic's outputs alone; records without one count in the whole."""
    records = [with_topic(n, **({"topic": "ab"[n % 2]} if n else {})) for n in range(7)]
    s = session(tmp_path, records, run__eval_prompts="7", run__eval_max_new_tokens="12")
    head = eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False)
    data = held_out(s.recipe, s.target, s.world)
    found = measure(head, s.recipe, s.target, data, s.world, s.stopper)
    kept, rounds = dict.fromkeys(["", "a", "b"], 0), dict.fromkeys(["", "a", "b"], 0)
    policy = s.recipe.policy
    for number, request in enumerate(data.requests):
        drafter, plan = head.drafter(s.target, policy.width), FixedPolicy(policy.depth, policy.budget)
        output = generate(s.target, [request], drafter, plan, GreedySampler())[0]
        topic = "ab"[number % 2] if number else ""
        kept[topic] += len(output.tokens) - 1
        rounds[topic] += len(output.rounds)
    assert found.by_topic == {topic: pytest.approx(kept[topic] / rounds[topic]) for topic in "ab"}
    assert found.tau == pytest.approx(sum(kept.values()) / sum(rounds.values()))


# ---- who is told ----


def tracker(folder: Path, *trackers: str) -> Tracker:
    return Tracker(folder, "t", {"a": 1}, active=True, record=True, resume_id=None, trackers=trackers)


def test_without_trackers_there_is_metrics_jsonl(tmp_path: Path):
    one = tracker(tmp_path)
    one.log(1, {"train/loss": 2.0})
    one.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["train/loss"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_tracker_that_fails_is_dropped_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, told = tracker(tmp_path), []

    def fail(*_: Any) -> None:
        raise OSError

    one._sinks = [  # type: ignore[list-item]
        SimpleNamespace(name="first", scalars=fail),
        SimpleNamespace(name="second", scalars=lambda step, values: told.append((step, values)), close=lambda: None),
    ]
    for step in (1, 2):
        one.log(step, {"x": step})
    one.close()
    assert told == [(1, {"x": 1}), (2, {"x": 2})]
    assert capsys.readouterr().out.count("first is gone (OSError)") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_missing_tensorboard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'mmspec-toolkit\[tensorboard\]'"):
        tracker(tmp_path, "tensorboard")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed (extra [tensorboard])"
)
def test_tensorboard_has_the_curves_of_metrics_jsonl(tmp_path: Path):
    """Also after a rewind: what was told of later steps is not there twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = tracker(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        one.log(step, {"train/loss": float(step), "accept/tau/a topic": 1.0})
    one.rewind(1)
    one.log(2, {"train/loss": 20.0})
    one.table(2, "samples", ["prompt", "tau"], [["a | b", 1.5]])
    one.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 20.0)]
    assert events.Scalars("accept/tau/a_topic")[0].value == 1.0
    assert "samples/text_summary" in events.Tags()["tensors"]


# ---- a real run ----


def test_a_run_writes_what_a_hand_computation_gives(tmp_path: Path):
    """Every step: operations of its batch over its seconds, their share of the given peak, memory; tau by topic.

    The batch of every step is the whole data set, so that its work is known.
    """
    records = [with_topic(n, topic="ab"[n % 2]) for n in range(4)]
    save_target(tmp_path / "target")
    data = save_data(tmp_path, records)
    recipe = save_recipe(tmp_path / "r.yaml", tmp_path / "target", data, tmp_path / "out", max_steps=3)
    more = ["optim.micro_batch=2", "optim.accumulate=2", "run.peak_tflops=0.25", "run.trackers=[]"]
    done = distill(0, recipe, *more, "run.eval_prompts=4")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "t"
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    s = session(tmp_path / "again", records)
    s.prepared = prepare(s)
    corpus, answers = s.corpus.samples, s.prepared.dialogues
    rows = [encode(sample, answers[i], s.target, s.target.max_length) for i, sample in enumerate(corpus)]
    features = s.target.teacher([p for p, _ in rows], [a for _, a in rows])
    head = eagle.Head(eagle.Config().resolve(s.target.shape))
    cost = head_cost(head, s.target.shape, 2) + target_cost(s.target.shape)
    operations = float(cost.of(counted(features.valid, features.answer, None, 2)))
    steps = [entry for entry in entries if "train/loss" in entry]
    assert len(steps) == 3
    for entry in steps:
        spent = {name: value for name, value in entry.items() if name.startswith("time/")}
        assert set(spent) == {"time/data_s", "time/target_s", "time/head_s", "time/optimizer_s"}
        seconds = sum(spent.values())
        assert entry["perf/tflops"] == pytest.approx(operations / seconds / 1e12, rel=1e-3)
        assert entry["perf/mfu"] == pytest.approx(entry["perf/tflops"] / 0.25)
        assert entry["perf/tokens_per_s"] == pytest.approx(int(features.valid.sum()) / seconds, rel=1e-3)
        assert 0.2 < entry["perf/memory_gb"] < 4.0
    measured = [entry for entry in entries if "accept/tau" in entry]
    assert {name for name in measured[-1] if name.startswith("accept/tau/")} == {"accept/tau/a", "accept/tau/b"}
    assert not (folder / "wandb").exists()
