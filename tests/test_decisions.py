"""The decisions page: figures by hand, rounds that are asked about, and a page that holds what was decided."""

from __future__ import annotations

import copy
import html
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import decision_page, decisions, samples
from eval.decision_figures import Asked, Decision, _rates, level
from eval.decisions import Decoder, Steered
from eval.tasks import Dialogues, data_folder, load_records
from mmspec import checkpoint
from mmspec.api import drafter_and_policy
from mmspec.checkpoint import DraftTree
from mmspec.costs import CostTable
from mmspec.hindsight import Outcome
from mmspec.loop import generate
from mmspec.policies._learned import LearnedPolicy
from mmspec.policy import FixedPolicy
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.types import Plan
from tests import tiny

TREE = DraftTree(3, 1, 3)


# ---- by hand ----


def chain(accepted: int) -> Outcome:
    """What became of a chain of three."""
    return Outcome(tuple(range(1, accepted + 1)), (1, 2, 3))


def test_what_is_foreseen_is_the_sum_of_chances_to_get_there():
    assert Decision(2, 2, (0.5, 0.4, 0.9)).foreseen == pytest.approx(0.5 + 0.2)
    assert Decision(0, 0, (0.5, 0.4, 0.9)).foreseen == 0
    assert Decision(0, 0, None).foreseen is None


def test_only_levels_that_were_reached_are_statements():
    said = (0.9, 0.8, 0.7)
    assert Asked(Decision(3, 3, said), chain(0), 1).statement == ((0.9,), 0)
    assert Asked(Decision(3, 3, said), chain(3), 1).statement == (said, 3)
    assert Asked(Decision(0, 0, None), chain(1), 1).statement is None
    assert Asked(Decision(0, 0, said), Outcome((), ()), 1).statement is None


@pytest.mark.parametrize(
    ("asks", "asleep", "left", "unseen"),
    [(True, 0, 5, ""), (False, 0, 5, "not asked"), (True, 3, 5, "asleep"), (True, 0, 1, "nothing to draft")],
)
def test_why_nothing_was_foreseen_is_kept(asks: bool, asleep: int, left: int, unseen: str):
    policy: Any = SimpleNamespace(
        asks=asks, asleep=asleep, said=[[0.5]], offered=[0, 1], max_depth=1, max_budget=1, mass_layer=None, senses=True,
        plan=lambda sensed, remaining: Plan(1, (1,)),
    )  # fmt: skip
    steered = Steered(policy)
    steered.plan([[0.0]], [left])
    assert steered.decisions == [Decision(1, 1, None if unseen else (0.5,), unseen)]


def test_a_round_says_why_nothing_was_foreseen():
    entry = {"number": 1, "plan": 3, "nodes": 3, "accepted": 2, "foreseen": None, "none": None}
    assert decision_page._words(entry | {"unseen": "not asked"}).endswith("3 nodes planned, not asked, 2 accepted")
    assert decision_page._words(entry | {"plan": 0, "unseen": "asleep"}) == "round 1: no draft (asleep)"
    told = {"unseen": "", "foreseen": 1.5, "none": 0.25}
    assert decision_page._words(entry | told).endswith("3 nodes planned, 1.5 foreseen, 2 accepted")
    assert decision_page._words(entry | told | {"plan": 0}).endswith("(chance that nothing is accepted 25%)")


def test_rates_by_hand():
    """Two rounds, of which a chain of three would have given all and nothing. A verification takes 1 s, a level 1 s."""
    flat = {n: 1.0 for n in range(1, 5)}
    costs = CostTable("here", {1: flat}, {1: {1: 1.0, 2: 2.0, 3: 3.0}})
    policy: Any = SimpleNamespace(costs=costs, max_depth=3, max_budget=3, offered=[0, 1, 2, 3])
    asked = [Asked(Decision(3, 3, None), chain(3), 1), Asked(Decision(1, 1, None), chain(0), 5)]
    found = _rates(asked, policy, TREE)
    assert found["tree"] == pytest.approx((4 + 1) / (4 + 4))
    assert found["best_fixed"] == 1  # (2 + 1) / 4, (3 + 1) / 6 and 5 / 8 are all below plain decoding
    assert found["best_depth"] == 0
    assert found["controller"] == pytest.approx((4 + 1) / (4 + 2))
    assert found["hindsight"] == pytest.approx(1)  # (4 + 1) / (4 + 1)
    assert found["regret"] == pytest.approx(1 - 5 / 6)
    assert found["captured"] is None


def test_levels_of_dependence():
    assert [level(kl) for kl in (0.0, 0.001, 0.05, 0.5, 1.0, 7.0)] == [0, 1, 2, 3, 4, 4]


# ---- decoded ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run_folder(tmp_path_factory.mktemp("runs") / "run", load_target("tiny_llava"), TREE)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    loaded = checkpoint.load(folder, None, "float64")
    target = load_target("tiny_llava", "float64")
    drafter, policy = drafter_and_policy(loaded, target, "viskip")
    assert isinstance(policy, LearnedPolicy)
    made = Decoder(target, drafter, policy, None)
    for task in tasks(made, 1):
        made.answer(task)  # opens both policies: biases and prices are there from then on
    return made


def tasks(decoder: Decoder, n: int) -> list[Any]:
    quarantine = Quarantine(None)
    records = load_records(data_folder("synth:testmini"), n, quarantine, 0.0)
    return [task for [task] in Dialogues(decoder.target, records, "", 12, quarantine).groups(1)][:n]


def test_answers_are_those_of_plain_decoding_and_every_round_has_its_decision(decoder: Decoder):
    for task in tasks(decoder, 4):
        answered, _ = decoder.answer(task)
        assert answered is not None
        drafter, sampler = decoder.drafter, GreedySampler()
        [plain] = generate(decoder.target, [task.request], drafter, FixedPolicy(0, 0), sampler)
        assert answered.output.tokens == plain.tokens
        assert len(answered.decisions) == len(answered.output.rounds)
        for decision, (action, nodes, _, _) in zip(answered.decisions, answered.output.rounds):
            assert (action == "draft") == (decision.depth > 0)
            assert nodes <= decision.nodes


def test_what_is_asked_about_is_what_the_largest_draft_gives(decoder: Decoder):
    """The rounds of a fixed largest draft, all but the last, and where they begin."""
    for task in tasks(decoder, 4):
        answered, _ = decoder.answer(task)
        assert answered is not None
        largest = FixedPolicy(TREE.depth, TREE.budget)
        [fixed] = generate(decoder.target, [task.request], decoder.drafter, largest, GreedySampler())
        rounds = fixed.rounds[:-1]
        assert [one.accepted for one in answered.asked] == [accepted for _, _, accepted, _ in rounds]
        places, at = [], 1
        for *_, emitted in rounds:
            places.append(at)
            at += emitted
        assert [one.at for one in answered.asked] == places


def test_own_seconds_are_those_of_the_answer(decoder: Decoder):
    """Of one that is left out they count nowhere."""
    first, second = (decoder.answer(task)[0] for task in tasks(decoder, 2))
    assert first is not None
    assert second is not None
    assert 0 < first.own_s < first.output.latency_s
    assert second.own_s == decoder.steered.own_s


def test_the_shadow_learns_nothing_into_the_controller_that_is_shown(decoder: Decoder):
    assert decoder.shadow.learned is not decoder.steered.learned
    assert decoder.shadow.learned.controller is decoder.steered.learned.controller
    [task] = tasks(decoder, 1)
    before = copy.deepcopy(decoder.steered.learned._met)
    decoder._decode(task, decoder.recorder, decoder.shadow)
    after = decoder.steered.learned._met
    assert before.keys() == after.keys()
    for way, met in after.items():
        assert met.bias == before[way].bias
        assert (met.trust, met.usual.tried) == (before[way].trust, before[way].usual.tried)


def test_a_controller_that_always_drafts_all_sees_the_same_rounds_from_its_shadow(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    """Then both decode alike, and are told alike: the same chances, plans and price at the end."""
    for learned in (decoder.steered.learned, decoder.shadow.learned):
        monkeypatch.setattr(learned, "cost", lambda depth: 0.0)
        monkeypatch.setattr(learned, "extra_s", [0.0] * learned.max_depth, raising=False)
    mine = decoder.steered.learned
    decoder.shadow.learned.met, decoder.shadow.learned.price = copy.deepcopy(mine.met), copy.copy(mine.price)
    for task in tasks(decoder, 3):
        decoder.shadow.decisions = []
        answered, _ = decoder.answer(task)
        assert answered is not None
        assert answered.decisions == decoder.shadow.decisions
        assert decoder.shadow.learned.price.per_s == pytest.approx(mine.price.per_s, rel=1e-9)


# ---- the command ----


def test_the_page_holds_answers_plans_and_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "page.html"
    words = ["--limit", "6", "--max-new-tokens", "24", "--dtype", "float64", "--max-batch", "2", "--out", str(out)]
    assert decisions.main(["--ckpt", str(folder), *words]) == 0
    page, result = out.read_text(), json.loads(out.with_suffix(".json").read_text())
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert str(folder) not in page
    row = result["topics"]["overall"]
    assert row["hindsight"] >= max(row["controller"], row["best_fixed"], row["tree"]) - 1e-9
    assert 0 <= row["regret"] < 1
    assert result["n_differing"] == 0
    assert result["asks"]
    assert len(result["topics"]) == 1 + page.count('class="sample"')
    assert {row["batch"] for row in result["batches"]} == {1, 2}
    n_levels = sum(row["rounds"] for row in result["levels"])
    assert 0 < result["calibration"][0]["n"] <= n_levels <= row["rounds"], (
        "rounds that it slept through have no chances"
    )
    shown = re.findall(r'<p class="answer">(.*?)</p>', page, re.DOTALL)
    texts = [html.unescape(re.sub(r"<[^>]+>", "", text)) for text in shown]
    assert all(texts)
    tables = re.findall(r'<table class="roundtable">.*?</table>', page, re.DOTALL)
    rows = [
        re.findall(r"<tr><td>(\d+)</td><td>(\w+)</td>.*?<td>(\d+)</td><td>\d+</td><td>[^<]*</td></tr>", t)
        for t in tables
    ]
    chips = [re.findall(r"<li[^>]*><b>(\w+)</b>(?: of (\d+))?", part) for part in page.split('class="rounds"')[1:]]
    for table, some in zip(rows, chips, strict=True):
        assert [plan if plan == "skip" else (accepted, plan) for _, plan, accepted in table] == [
            word if word == "skip" else (word, plan) for word, plan in some
        ]
        assert [int(number) for number, *_ in table] == list(range(1, len(table) + 1))
    assert "rounds, MAT" in capsys.readouterr().out
    # The same where the controller would not be asked, and some answers were too short to judge.
    other = decision_page.render({**result, "asks": False, "n_short": 2}, [])
    assert "<li>the controller is not asked here</li>" in other
    assert "<th>usual depth</th>" in other
    assert "<th>controller</th>" not in other
    assert "2 requests left out: over before a round" in other
    assert "<th>controller</th>" in page


def test_answers_that_are_too_short_to_judge_are_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The second among them: its rounds with the largest draft are taken away."""
    answer, calls = Decoder.answer, []

    def shortened(self: Decoder, task: Any) -> Any:
        answered, text = answer(self, task)
        calls.append(answered)
        return replace(answered, asked=[]) if len(calls) == 2 else answered, text

    monkeypatch.setattr(Decoder, "answer", shortened)
    out = tmp_path / "page.html"
    words = ["--limit", "3", "--max-new-tokens", "12", "--dtype", "float64", "--max-batch", "1", "--out", str(out)]
    assert decisions.main(["--ckpt", str(folder), *words]) == 0
    result = json.loads(out.with_suffix(".json").read_text())
    kept = [one for place, one in enumerate(calls) if place != 1 and one.asked]
    assert (result["n_requests"], result["n_short"]) == (len(kept), len(calls) - len(kept))
    share = sum(one.own_s for one in kept) / sum(one.output.latency_s for one in kept)
    assert result["control_share"] == pytest.approx(share)
    assert f"{result['n_short']} requests left out: their answers are over before" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert decisions.main(["--ckpt", str(folder), "--out", str(tmp_path / "page")]) == 2
    assert "must end in .html" in capsys.readouterr().err
    bare = tiny.run_folder(tmp_path / "bare", load_target("tiny_llava"), TREE)
    (bare / "viskip.safetensors").unlink()
    (bare / "viskip.json").unlink()
    assert decisions.main(["--ckpt", str(bare), "--out", str(tmp_path / "page.html")]) == 2
    assert "has no controller" in capsys.readouterr().err


def test_the_texts_of_tokens_are_the_answer():
    target = load_target("tiny_llava")
    ids = target.encode([{"role": "user", "content": "How many red stars, and how many blue ones?"}], []).input_ids
    tokens = [token for token in ids.tolist() if token not in target.special_ids]
    rounds = [("skip", 0, 0, 1)] * (len(tokens) - 1)
    found = samples.texts(target, tokens, rounds)
    assert "".join(token["text"] for token in found) == target.decode(tokens)
