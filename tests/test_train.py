"""Training's parts in one process: what is wrong input, what is quarantined, what a batch is, what is resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from mmspec import arguments
from mmspec.heads import eagle, viskip
from mmspec.login import wandb_mode
from mmspec.recipe import Optim, Source, load
from mmspec.records import Quarantine
from mmspec.types import InputError, Output
from tests import tiny
from tests.training import ALONE, prepare, record, save_data, save_recipe, session
from train import calibrate, controller, distill, regenerate, run, visual
from train.corpus import check_sources, read
from train.encode import encode
from train.engine import engine_settings, learning_rate
from train.estimate import target_facts
from train.measure import held_out, marked
from train.order import Order, deal
from train.session import begin, finished
from train.stopping import Stopped, Stopper
from train.world import World

ROOT = Path(__file__).parent.parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_recipe(tmp_path / "r.yaml", "tiny_llava", tmp_path / "data.json", tmp_path / "runs")


def read_all(path: Path, quarantine: Quarantine | None = None) -> Any:
    return read([Source(str(path))], quarantine or Quarantine(None))


# ---- wrong input: one line, exit code 2 ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.micro_bach=2"], "did you mean 'micro_batch'"),
        (["head.kind=medusaa"], "mmspec/heads has: "),
        (["data.train=nowhere.json"], "nowhere.json does not exist"),
        (["data.train=synth:trian"], "no such split"),
        (["optim.micro_batch=0"], "must be at least 1"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(
    path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert distill.main([str(path), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distill: error: ")
    assert error.count("\n") == 1
    assert said in error


def test_a_missing_recipe_ends_the_same_way(capsys: pytest.CaptureFixture[str]):
    assert distill.main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("distill: error: recipe nowhere.yaml does not exist")


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_dry_run_needs_no_weights(recipe: Path, capsys: pytest.CaptureFixture[str]):
    """Its target's shape is known, and its head fits it."""
    assert distill.main([str(recipe), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for words in ("micro_batch:", "parameters, trained", "memory per process", "optimizer state", "disk"):
        assert words in said


def test_dry_run_of_the_real_target_knows_its_size(capsys: pytest.CaptureFixture[str]):
    assert distill.main([str(ROOT / "recipes" / "viskip_llava7b.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "7.06 B parameters, frozen" in said  # as its model card says
    assert distill.main([str(ROOT / "recipes" / "viskip_llava7b.yaml"), "--dry-run", "target.name=x/y"]) == 2


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen2-VL-2B-Instruct",
        "Qwen/Qwen2-VL-7B-Instruct",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
    ],
)
def test_estimated_parameters_are_those_of_the_model(name: str):
    """Within half a percent of the real class, built without memory from the table's shapes."""
    facts = json.loads((ROOT / "mmspec" / "assets" / "shapes.json").read_text())[name]
    kind = name.split("/")[1].split("-VL")[0].lower().replace(".", "_") + "_vl"
    text, vision = facts["text"], dict(facts["vision"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text["mrope_section"]}
    if kind == "qwen2_vl":
        vision["hidden_size"] = text["hidden_size"]
    tied = facts["tie_word_embeddings"]
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    n_real = sum(p.numel() for p in model.parameters())
    assert target_facts(name).n_parameters == pytest.approx(n_real, rel=5e-3)


# ---- data ----

FLAWS: dict[str, Any] = {
    "not an object": 3,
    "no conversation": {"id": "a", "image": "0.png", "conversations": []},
    "no conversations key": {"id": "a", "image": "0.png"},
    "number as text": {"id": "a", "image": "0.png", "conversations": [{"from": "human", "value": 7}]},
    "blank text": {"id": "a", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\n "}]},
    "wrong speaker": {"id": "a", "image": "0.png", "conversations": [{"from": "gpt", "value": "hi"}]},
    "number as image": {"id": "a", "image": ["0.png", 1], "conversations": [{"from": "human", "value": "hi"}]},
    "more marks than images": {
        "id": "a",
        "image": ["0.png"],
        "conversations": [{"from": "human", "value": "<image><image>hi"}],
    },
    "mark without image": {"id": "a", "conversations": [{"from": "human", "value": "<image>hi"}]},
    "lone surrogate": {"id": "a", "image": "0.png", "conversations": [{"from": "human", "value": "\ud800"}]},
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flawed_record_is_quarantined_and_the_others_stay(tmp_path: Path, flaw: str):
    data = save_data(tmp_path, [record(0), FLAWS[flaw], record(2)])
    quarantine = Quarantine(tmp_path / "q.jsonl")
    corpus = read_all(data, quarantine)
    assert [sample.id for sample in corpus.samples] == ["r0", "r2"]
    entry = json.loads((tmp_path / "q.jsonl").read_text())
    assert entry["line"] == 2
    assert entry["reason"]


def test_zero_usable_records(tmp_path: Path):
    for records in ([], list(FLAWS.values())):
        with pytest.raises(InputError, match="no usable record") as error:
            read_all(save_data(tmp_path, records))
        assert "\n" not in str(error.value)


def test_files_that_are_no_data(tmp_path: Path):
    for text in ("{", '{"a": 1}', "\xff"):
        (tmp_path / "bad.json").write_text(text, encoding="latin-1")
        with pytest.raises(InputError, match=r"bad\.json"):
            read_all(tmp_path / "bad.json")
    with pytest.raises(InputError, match=r"no llava\.json"):
        check_sources([Source(str(tmp_path))])


def test_the_image_mark_says_where_the_picture_stands(tmp_path: Path):
    one = record(0)
    one["conversations"][0]["value"] = "before <image> after"
    sample = read_all(save_data(tmp_path, [one])).samples[0]
    kinds = [part.get("text", part["type"]) for part in sample.messages(())[0]["content"]]
    assert kinds == ["before", "image", "after"]


def test_several_pictures_stand_at_their_marks_or_in_front(tmp_path: Path):
    marked, bare = record(0), record(1)
    marked["image"] = bare["image"] = ["1.png", "0.png"]
    marked["conversations"][0]["value"] = "one <image> two <image>"
    bare["conversations"][0]["value"] = "three"
    first, second = read_all(save_data(tmp_path, [marked, bare])).samples
    kinds = [[part.get("text", "*") for part in s.messages(())[0]["content"]] for s in (first, second)]
    assert kinds == [["one", "*", "two", "*"], ["*", "*", "three"]]
    assert [image.tobytes() for image in first.images()] == [tiny.image(n).tobytes() for n in (1, 0)]


def test_order_is_every_sample_once_an_epoch_for_any_batch_size():
    small, large = Order([1.0] * 10, 5), Order([1.0] * 10, 5)
    stream = [index for step in range(10) for index in small.batch(step, 3)]
    assert stream == [index for step in range(3) for index in large.batch(step, 10)]
    for epoch in range(3):
        assert sorted(stream[epoch * 10 : epoch * 10 + 10]) == list(range(10))
    again = Order([1.0] * 10, 5)
    assert again.batch(7, 3) == stream[21:24], "a resumed run must go on where it was"


def test_weights_say_how_often_a_sample_is_drawn():
    order = Order([2.0, 0.5], 0)
    stream = order.batch(0, 4000)
    assert stream.count(0) / stream.count(1) == pytest.approx(4.0, rel=0.1)


@pytest.mark.parametrize(("size", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_global_batch_is_dealt_out_exactly_once(size: int, accumulate: int):
    lengths = [3, 9, 1, 7, 7, 2, 8, 4]
    dealt = [deal(range(8), lengths, rank, size, accumulate) for rank in range(size)]
    assert sorted(index for micro in dealt for part in micro for index in part) == list(range(8))
    assert {len(part) for micro in dealt for part in micro} == {8 // size // accumulate}


# ---- answers ----


def test_answers_are_the_targets_own_turn_by_turn(tmp_path: Path):
    s = session(tmp_path, [record(0, turns=3), record(1), record(2, turns=2)])
    prepared = prepare(s)
    assert [len(prepared.dialogues[index].answers) for index in range(3)] == [3, 1, 2]
    from mmspec.drafters.null import NullDrafter
    from mmspec.loop import generate
    from mmspec.policy import FixedPolicy
    from mmspec.sampling import GreedySampler
    from mmspec.types import Request

    sample, dialogue = s.corpus.samples[0], prepared.dialogues[0]
    prompt = s.target.encode(sample.messages(dialogue.answers[:2], 3), sample.images())
    alone = generate(s.target, [Request("x", prompt, 8)], NullDrafter(), FixedPolicy(0, 0), GreedySampler())[0]
    assert s.target.decode(alone.tokens).strip() == dialogue.answers[2]


def test_a_reply_that_was_cut_trains_no_stop_token(tmp_path: Path):
    s = session(tmp_path, [record(0)])
    sample = s.corpus.samples[0]
    cut = encode(sample, regenerate.Dialogue(("w1 w2",), (False,), 0), s.target, 99)[1]
    whole = encode(sample, regenerate.Dialogue(("w1 w2",), (True,), 0), s.target, 99)[1]
    assert int((whole > 0).sum()) - int((cut > 0).sum()) == 1


def test_bad_images_and_long_prompts_are_quarantined_with_reasons(tmp_path: Path):
    records = [record(number) for number in range(6)]
    records[4]["conversations"][0]["value"] = "w1 " * 300
    s = session(tmp_path, records, data__max_bad_share="0.9")
    (tmp_path / "images" / "1.png").unlink()
    cut = tmp_path / "images" / "2.png"
    cut.write_bytes(cut.read_bytes()[:80])
    (tmp_path / "images" / "3.png").write_text("no picture")
    prepared = prepare(s)
    assert sorted(prepared.dialogues) == [0, 5]
    entries = [json.loads(line) for line in (s.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in entries] == ["r1", "r2", "r3", "r4"]
    for entry, words in zip(entries, ("missing", "2.png", "3.png", "longer than the context")):
        assert words in entry["reason"]


def test_too_many_bad_records_stop_the_run(tmp_path: Path):
    records = [record(number) for number in range(5)]
    s = session(tmp_path, records, data__max_bad_share="0.3")
    for name in ("1.png", "2.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(InputError, match="2 of 5 records are unusable"):
        prepare(s)


def test_held_out_prompts_that_cannot_be_used_are_counted(tmp_path: Path):
    """Tau of a few prompts that are left must not pass for that of all that were asked for."""
    records = [record(number) for number in range(5)]
    records[2]["conversations"][0]["value"] = "w1 " * 300
    records[3] = FLAWS["no conversation"]
    s = session(tmp_path, records, run__eval_prompts="64")
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "images" / "4.png").write_text("no picture")
    data = held_out(s.recipe, s.target, s.world)
    assert [request.id for request in data.requests] == ["r0"]
    assert data.described == "1 prompts (4 left out)"
    (tmp_path / "images" / "0.png").write_text("no picture")
    with pytest.raises(InputError, match=r"run\.eval_data=.*: none of its 5 prompts can be read"):
        held_out(s.recipe, s.target, s.world)
    all_of_them = held_out(session(tmp_path / "whole", [record(0)]).recipe, s.target, s.world)
    assert all_of_them.described == "1 prompts"


def test_given_answers_are_used_as_they_are(tmp_path: Path):
    s = session(tmp_path, [record(0), record(1, turns=2)], data__answers="given")
    assert prepare(s).dialogues[1].answers == s.corpus.samples[1].answers


def test_answer_counts_are_those_of_the_tokens_that_are_trained(tmp_path: Path):
    """Counted without pictures, over any number of ranks, as often as a sample is drawn."""
    s = session(tmp_path, [record(number, turns=1 + number % 2) for number in range(5)])
    s.prepared = prepare(s)
    s.corpus = replace(s.corpus, weights=(2.0, *s.corpus.weights[1:]))
    expected = torch.zeros(s.target.shape.vocab_size, dtype=torch.float64)
    for index, sample in enumerate(s.corpus.samples):
        prompt, answer = encode(sample, s.prepared.dialogues[index], s.target, 999)
        for token in prompt.input_ids[answer > 0]:
            expected[token] += s.corpus.weights[index]
    counts = regenerate.answer_counts(s.corpus, s.prepared, s.target, ALONE)
    assert torch.equal(counts, expected)
    assert counts[s.target.image_token_id] == 0
    shares = [
        regenerate.answer_counts(s.corpus, s.prepared, s.target, _Rank(rank, 2, ALONE.device, None)) for rank in (0, 1)
    ]
    assert torch.equal(shares[0] + shares[1], expected)


class _Rank(World):
    """One of several ranks, asked for its share alone."""

    def sum(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values)


class _StopAfter(Stopper):
    """Asked to stop at the n-th question."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def asked(self) -> int:
        self.n -= 1
        return 15 if self.n < 0 else 0


@pytest.mark.parametrize("patience", [1, 5, 12])
def test_stopped_answers_go_on_to_the_same_end(tmp_path: Path, patience: int):
    records = [record(number, turns=1 + number % 2) for number in range(40)]
    whole = prepare(session(tmp_path, records))
    s = session(tmp_path, records, run__name="stopped", data__answer_batch="2")
    s.stopper = _StopAfter(patience)
    with pytest.raises(Stopped):
        prepare(s)
    shard = next((s.folder / "answers").rglob("part-0.jsonl"))
    before = shard.read_text()
    shard.write_text(before + '{"index": 39, "answers": ["w')  # a process killed while writing
    s.stopper = Stopper()
    after = prepare(s)
    assert [after.line(k) for k in range(40)] == [whole.line(k) for k in range(40)]
    assert not shard.exists()


# ---- rollout ----


def test_visual_mass_is_the_mean_over_the_next_four_positions():
    mass = torch.arange(10.0).unsqueeze(1)
    label, valid = visual.ahead(mass, torch.tensor([0, 5, 8, 9, 10]))
    assert label.flatten().tolist()[:4] == [1.5, 6.5, 8.5, 9.0]
    assert valid.tolist() == [True, True, True, True, False]


def test_mass_layers_are_spread_and_end_with_the_last():
    assert visual.mass_layers(12, 4) == (2, 5, 8, 11)
    assert visual.mass_layers(12, 1) == (11,)
    assert visual.mass_layers(12, 0) == ()


def test_stopped_rollouts_go_on_to_the_same_rounds(tmp_path: Path):
    s = session(tmp_path, [record(number) for number in range(12)], policy__kind="learned", policy__rollouts="12")
    s.prepared = prepare(s)
    head = eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False)
    controller.rollout(s, head)
    whole = controller._gather(s)
    assert whole["visual_mass"].shape == (len(whole["accepted"]), 1)
    shutil.rmtree(s.folder / "rollout")
    s.stopper = _StopAfter(6)
    with pytest.raises(Stopped):
        controller.rollout(s, head)
    assert 0 < len(list((s.folder / "rollout").iterdir())) < 3
    s.stopper = Stopper()
    controller.rollout(s, head)
    for name, tensor in controller._gather(s).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_share_of_a_rollout_is_sampled_and_calibration_is_told_by_temperature(tmp_path: Path):
    records = [record(number) for number in range(12)]
    wanted = {"policy__kind": "learned", "policy__rollouts": "12", "policy__sampled_share": "0.5"}
    s = session(tmp_path, records, **wanted)
    s.prepared = prepare(s)
    head = eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False)
    controller.rollout(s, head)
    rounds = controller._gather(s)
    keys = {k: {turn.index for turn in chunk} for k, chunk in enumerate(controller._chunks(s))}
    for number, temperature in ((0, 0.0), (1, 1.0), (2, 0.0)):
        mine = torch.isin(rounds["key"], torch.tensor(sorted(keys[number])))
        assert set(rounds["temperature"][mine].tolist()) == {temperature}
    config = viskip.Config(width=8, depth=2, n_mass=1).resolve(s.target.shape)
    network = viskip.Head(config)
    torch.nn.init.zeros_(network.hazard.weight)
    torch.nn.init.constant_(network.hazard.bias, 1.0)
    held_out = controller._batch(rounds, torch.arange(len(rounds["accepted"])), s.target)["rounds"]
    found = calibrate.reliability(network, held_out)
    assert [bucket["temperature"] for bucket in found] == [0.0, 1.0]
    chance = 1 / (1 + math.exp(-1))
    for bucket in found:
        mine = rounds["temperature"] == bucket["temperature"]
        share = float((rounds["accepted"][mine] > 0).float().mean())
        first = bucket["by_depth"][0]
        assert bucket["rounds"] == first["n"] == int(mine.sum())
        assert first["ece"] == pytest.approx(abs(chance - share), abs=1e-5)
        by_hand = share * (1 - chance) ** 2 + (1 - share) * chance**2
        assert first["brier"] == pytest.approx(by_hand, abs=1e-5)
    assert set(calibrate.flat_reliability(found)) >= {"viskip/val_ece_t0_1", "viskip/val_brier_t1_1"}
    assert calibrate.reliability(network, {name: table[:0] for name, table in held_out.items()}) == []


def test_no_two_sampled_turns_share_their_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Noise is drawn by seed, key and position: keys are those of the whole rollout, not of a chunk."""
    wanted = {"policy__kind": "learned", "policy__rollouts": "12", "policy__sampled_share": "1"}
    s = session(tmp_path, [record(number) for number in range(12)], **wanted)
    s.prepared = prepare(s)
    decode, keys = controller.generate, []

    def noted(target: Any, requests: Any, *rest: Any, **more: Any) -> Any:
        keys.extend(request.key for request in requests)
        return decode(target, requests, *rest, **more)

    monkeypatch.setattr(controller, "generate", noted)
    controller.rollout(s, eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False))
    assert len(controller._chunks(s)) == 3
    assert sorted(keys) == list(range(12))
    assert set(controller._gather(s)["key"].tolist()) <= set(range(12))


LEARNED = {"policy__kind": "learned", "policy__rollouts": "4"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head__init_from": "another"}, "was made with head.init_from=None, not another"),
        ({"optim__lr": "0.5"}, r"was made with optim.lr=0.001, not 0.5; set it so, or leave policy.rollouts_from out"),
        ({"loss__steps": "1"}, "was made with loss.steps=2, not 1"),
        ({"target__dtype": "bfloat16"}, "was made with target.dtype=float32, not bfloat16"),
        ({"data__max_new_tokens": "9"}, "was made with data.max_new_tokens=8, not 9"),
        ({"optim__micro_batch": "2"}, "processes x optim.micro_batch x optim.accumulate=4, not 2"),
        ({"policy__controller__depth": "3"}, "was made with policy.controller.depth=2, not 3"),
        ({"policy__controller__n_mass": "2"}, "has labels of policy.controller.n_mass=1"),
        ({"policy__controller__counterfactual": "mean"}, "has labels of policy.controller.counterfactual=none"),
    ],
)
def test_rounds_are_taken_only_from_a_run_of_the_same_drafter_with_the_same_labels(
    tmp_path: Path, change: dict[str, str], said: str
):
    """A controller must not learn what became of another head's drafts."""
    records = [record(number) for number in range(4)]
    s = session(tmp_path, records, **LEARNED)
    replace(s.state, recipe=s.recipe.as_dict()).save(s.folder)
    other = session(tmp_path, records, **LEARNED, **change)
    with pytest.raises(InputError, match=said):
        controller._take_rounds(other, s.folder, 0)


def test_rounds_are_taken_for_any_controller_that_reads_less(tmp_path: Path):
    records = [record(number) for number in range(4)]
    s = session(tmp_path, records, **LEARNED)
    replace(s.state, recipe=s.recipe.as_dict()).save(s.folder)
    reads = {"policy__controller__reads": "scalars", "policy__controller__n_mass": "0"}
    trains = {"policy__steps": "9", "policy__optim__lr": "0.1", "policy__controller__width": "8"}
    split = {"optim__micro_batch": "2", "optim__accumulate": "2", "data__answer_batch": "2"}
    taken = {"run__name": "u", "policy__rollouts_from": str(s.folder)}
    controller._take_rounds(session(tmp_path, records, **LEARNED, **reads, **trains, **split, **taken), s.folder, 0)
    with pytest.raises(InputError, match="has no complete rollout: chunk-00000"):
        controller._take_rounds(session(tmp_path, records, **LEARNED, **taken), s.folder, 1)
    with pytest.raises(InputError, match="nowhere is no run of the same data"):
        controller._take_rounds(s, tmp_path / "nowhere", 0)


def test_rounds_of_one_image_stay_in_one_part_of_the_split():
    images = [f"image {number // 3}" for number in range(120)]
    parts = controller._split(images, 0)
    assert sorted(torch.cat(parts).tolist()) == list(range(120))
    assert [len(part) for part in parts] == [84, 18, 18]
    shown = [{images[row] for row in part.tolist()} for part in parts]
    assert not shown[0] & shown[1]
    assert not shown[0] & shown[2]
    assert not shown[1] & shown[2]
    assert [len(part) for part in controller._split(["one"] * 5, 0)] == [5, 0, 0]


# ---- schedule, engine settings, display ----


def test_learning_rate_warms_up_and_ends_at_zero():
    optim = Optim(lr=1.0, warmup=4, micro_batch=1)
    rates = [learning_rate(step, 20, optim) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[20] == pytest.approx(0.0)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_engine_file_may_not_repeat_the_recipe(tmp_path: Path):
    from mmspec.recipe import DeepSpeedNode

    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"overlap_comm": false}, "prescale_gradients": true}')
    node = DeepSpeedNode(zero_stage=2, config=str(path))
    settings = engine_settings(node, Optim(lr=1.0, micro_batch=3, accumulate=2), 4, 70)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 70}
    assert settings["train_batch_size"] == 24
    assert settings["prescale_gradients"]
    path.write_text('{"optimizer": {}}')
    with pytest.raises(InputError, match="'optimizer'"):
        engine_settings(node, Optim(lr=1.0, micro_batch=3), 1, 70)
    for text, said in (
        ('{"fp16": {"enabled": true}}', r"use deepspeed\.bf16=true"),
        ('{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}', "offloads to 'nvme'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            engine_settings(node, Optim(lr=1.0, micro_batch=3), 1, 70)


def test_accepted_runs_are_marked_in_samples():
    class Speller:
        def decode(self, tokens: list[int]) -> str:
            return "".join("abcdefgh"[token] for token in tokens)

    output = Output(
        "x", [0, 1, 2, 3, 4, 5], "stop", 0.0, 0.0, [("draft", 4, 2, 3), ("skip", 0, 0, 1), ("draft", 4, 3, 1)]
    )
    assert marked(Speller(), output) == "a⟦bc⟧de⟦f⟧"  # type: ignore[arg-type]


def test_wandb_asks_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0\n")
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_a_new_start_sets_the_old_results_aside(tmp_path: Path, path: Path):
    recipe = load(path)
    begin(recipe, 1)
    (recipe.folder / "head.safetensors").write_text("old")
    (recipe.folder / "answers").mkdir()
    begin(recipe, 1)
    assert (recipe.folder / "previous" / "head.safetensors").read_text() == "old"
    assert not (recipe.folder / "head.safetensors").exists()
    assert (recipe.folder / "answers").is_dir()


def test_resuming_with_another_recipe_is_refused(path: Path):
    begin(load(path), 2)
    with pytest.raises(InputError, match=r"optim\.lr=0\.001, not 0\.5"):
        begin(load(path, ["run.resume=true", "optim.lr=0.5"]), 2)
    with pytest.raises(InputError, match="2 processes x micro_batch 4"):
        begin(load(path, ["run.resume=true"]), 1)
    assert begin(load(path, ["run.resume=true", "run.eval_every=7"]), 2)[1]


def test_a_run_that_cannot_go_on_for_lack_of_a_picture_names_it(tmp_path: Path):
    """So that it can be put back: the head that was trained so far is worth it."""
    data = save_data(tmp_path, [record(number) for number in range(4)])
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs", trackers=[])
    recipe = load(path, ["run.resume=true", "data.max_bad_share=0.5"])
    state = begin(recipe, 1)[0]
    state.data = read_all(data).digest
    state.save(recipe.folder)
    for number in (2, 3):
        (tmp_path / "images" / f"{number}.png").unlink()
    with pytest.raises(InputError, match=rf"without their picture: 2, the first {data}:3, 2.png; put back") as error:
        run._open(recipe, ALONE, Stopper(), True)
    assert "start over without run.resume=true" in str(error.value)
    assert "\n" not in str(error.value)


class _OfTwo(World):
    """One of two ranks; `theirs` is what the other one has read."""

    theirs: Any = None

    def share(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> Any:
        return [value, self.theirs] if self.first else [self.theirs, value]


def test_ranks_that_read_other_data_end_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What one of them alone quarantines would shift all its indices."""
    data = save_data(tmp_path, [record(number) for number in range(4)])
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    recipe, strict = load(path, ["data.max_bad_share=0.5"]), load(path)
    first, second = (_OfTwo(rank, 2, ALONE.device, None) for rank in (0, 1))
    whole = read_all(data).digest
    monkeypatch.setattr(_OfTwo, "theirs", (whole, ""))
    for world in (first, second):
        assert run._read_together(recipe, Quarantine(None), world).digest == whole
    (tmp_path / "images" / "2.png").unlink()
    for world in (first, second):
        with pytest.raises(InputError, match=r"rank 1 has not read the data that rank 0 has \(records or"):
            run._read_together(recipe, Quarantine(None), world)
    with pytest.raises(InputError, match=r"rank 1 has not read the data that rank 0 has \(1 of 4 records"):
        run._read_together(strict, Quarantine(None), second)


def test_a_rank_above_zero_leaves_the_word_to_rank_zero(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    waited: list[float] = []
    monkeypatch.setattr(arguments, "time", SimpleNamespace(sleep=waited.append))
    monkeypatch.setattr(arguments, "default_signals", lambda: None)
    monkeypatch.setenv("RANK", "1")

    @arguments.command("distill")
    def main() -> None:
        raise InputError("two\nlines")

    assert main() == 2
    assert waited == [arguments.PATIENCE_S]
    assert capsys.readouterr().err == "distill: error: two lines\n"


def test_an_interruption_is_told_where_a_command_says_what_it_means(capsys: Any):
    def work() -> None:
        raise KeyboardInterrupt

    assert arguments.command("findings", interrupted="the same command goes on")(work)() == 130
    assert capsys.readouterr().err == "findings: interrupted; the same command goes on\n"
    with pytest.raises(KeyboardInterrupt):
        arguments.command("findings")(work)()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "state.json").write_text("{"), "state.json cannot be read"),
        (lambda folder: (folder / "state.json").write_text('{"phase": "head"}'), "state.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), "no state.json"),
    ],
)
def test_a_damaged_state_is_one_line_and_costs_no_checkpoint(tmp_path: Path, damage: Callable[[Path], Any], said: str):
    recipe = load("recipes/viskip_tiny.yaml", [f"run.out={tmp_path}", "run.resume=true"])
    begin(recipe, 1)
    (recipe.folder / "state" / "head" / "step-00000001").mkdir(parents=True)
    damage(recipe.folder)
    for asked in (lambda: begin(recipe, 1), lambda: finished(recipe)):
        with pytest.raises(InputError, match=said):
            asked()
    assert (recipe.folder / "state" / "head" / "step-00000001").is_dir()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', "deepspeed.offload_optimizer=true"),
        ('{"zero_optimization": null}', "must be a JSON object"),
        ('{"bf16": true}', "must be a JSON object"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "number of elements"),
    ],
)
def test_engine_file_does_not_contradict_the_recipe(tmp_path: Path, content: str, said: str):
    from mmspec.recipe import DeepSpeedNode

    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        engine_settings(DeepSpeedNode(zero_stage=2, config=str(path)), Optim(lr=1.0, micro_batch=1), 1, 70)
