"""The three findings: answers where the truth is known, plans, what is refused, and the commands at toy size."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import findings, findings_batch, findings_latency, findings_text_only
from eval.bench import Result
from eval.findings_runs import Found, Run, as_json, as_markdown
from eval.summary import summarise
from eval.verdicts import FAILS, HOLDS, OPEN, Claim, Compared, estimate, family, growth, totals
from mmspec import metrics
from mmspec.types import Output
from train.answers import Dialogue
from train.sample import Sample

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import text_twin

TOPICS = ("chart understanding", "text vqa")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch):
    """Enough for p under 0.05 in families of ten."""
    monkeypatch.setattr(metrics, "RESAMPLES", 1000)


# ---- verdicts ----


def units(ratio: float, scatter: float, n: int = 60, seed: int = 1) -> np.ndarray:
    """[n, 2] seconds of two methods, the first `ratio` times as slow."""
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(0, 0.5, n)
    return np.stack([seconds * ratio * rng.lognormal(0, scatter, n), seconds], 1)


@pytest.mark.parametrize(
    ("ratio", "scatter", "answer"),
    [
        (1.3, 0.1, HOLDS),
        (1.0, 0.02, FAILS),
        (0.8, 0.1, FAILS),
        (1.012, 0.005, FAILS),
        (1.05, 0.6, OPEN),
        (1.019, 0.01, OPEN),
    ],
)
def test_an_answer_follows_the_truth_and_how_well_it_is_known(ratio: float, scatter: float, answer: str):
    rows = units(ratio, scatter)
    [test] = family([estimate("x", rows, range(len(rows)), totals)])
    assert test.answer == answer
    assert test.lo <= test.value <= test.hi
    assert Claim("c", "m", (test,)).answer == answer
    assert Claim("c", "m", (test,), valid=False).answer == OPEN


def test_the_estimate_is_the_speedup_of_metrics():
    rows = units(1.4, 0.3)
    clusters = [k // 3 for k in range(len(rows))]
    mine, columns = estimate("x", rows, clusters, totals), rows.T.tolist()
    theirs, p = metrics.contrast(columns, clusters, metrics.ratio, 1.0, metrics.RESAMPLES)
    assert (mine.value, mine.lo, mine.hi, mine.p) == pytest.approx((theirs.value, theirs.lo, theirs.hi, p))


def test_few_clusters_decide_nothing():
    few = [k % 5 for k in range(60)]
    for rows, clusters in ((units(2, 0.1), [0] * 60), (units(2, 0.1), few), (np.zeros((0, 2)), [])):
        assert family([estimate("x", rows, clusters, totals)])[0].answer == OPEN
    with pytest.raises(ValueError, match="unpaired"):
        estimate("x", units(2, 0.1), [0], totals)


def test_claims_made_together_are_held_to_the_level_of_their_family():
    alone = Compared("a", 1.1, 1.01, 1.2, 0.03)
    assert family([alone])[0].answer == HOLDS
    assert [test.answer for test in family([alone, Compared("b", 1.1, 1.0, 1.2, 0.04)])] == [OPEN, OPEN]


@pytest.mark.parametrize(("truth", "answer"), [(1.3, HOLDS), (1.0, FAILS), (0.9, FAILS)])
def test_growth_is_told_from_a_gain_that_stays(truth: float, answer: str):
    rows = np.hstack([units(1.5 * truth, 0.02, seed=2), units(1.5, 0.02, seed=3)])
    assert family([estimate("x", rows, range(60), growth)])[0].answer == answer


# ---- experiments on made-up runs ----


def run_of(batches: list[int], methods: dict[str, dict[str, Any]], speed: Callable[..., float], n: int = 64) -> Run:
    """A run of n requests whose times are what `speed(method, batch, n_tokens)` says, and scatter a little.

    A plain request takes 10 ms and 1 ms a token; a group takes as long as its longest row.
    """
    cells: dict[int, dict[str, list[Result]]] = {}
    for batch in batches:
        rng = np.random.default_rng(batch)
        for name in ("plain", *methods):
            found: list[Result] = []
            for k in range(n):
                n_tokens = 5 + 7 * (k * 13 % 17)
                fast = 1.0 if name == "plain" else speed(name, batch, n_tokens)
                latency_s = (0.010 + 0.001 * n_tokens / fast) * rng.lognormal(0, 0.003)
                n_rounds = max(1, round(n_tokens / fast))
                rounds = [("draft", 3, 1, 2)] * n_rounds
                output = Output(str(k), list(range(n_tokens)), "stop", 0.010, latency_s, rounds)
                match = metrics.Match(None, False)
                topic = TOPICS[2 * k // n]
                found.append(
                    Result(str(k), topic, f"{k}.png", 1, name, output, "", k // batch, 0.0, match, 9, 4, "",
                           phases_s={"draft_s": 1.0})
                )  # fmt: skip
            cells.setdefault(batch, {})[name] = _with_groups(found)
    return Run(_summary(cells, methods), cells)


def _with_groups(results: list[Result]) -> list[Result]:
    longest: dict[int, float] = {}
    for one in results:
        longest[one.group] = max(longest.get(one.group, 0.0), one.output.latency_s)
    return [Result(**{**vars(one), "group_s": longest[one.group]}) for one in results]


def _summary(cells: dict[int, dict[str, list[Result]]], methods: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = ["plain", *methods]
    said = [
        summarise([one for name in names for one in cell[name]], names, names[-1], batch, 0)
        | {"batch_size": batch, "contention": {"unreliable": False}}
        for batch, cell in cells.items()
    ]
    how = {"plain": {"drafter": "none", "policy": "never draft"}, **methods}
    return {**said[0], "cells": said, "settings": {"methods": how}}


def head(folder: str, policy: str = "fixed") -> dict[str, Any]:
    return {"drafter": "eagle", "checkpoint": folder, "policy": policy}


def answers(found: Found) -> dict[str, str]:
    assert json.dumps(as_json(found), allow_nan=False)
    assert found.finding in as_markdown(found)
    assert all(chart.startswith("<svg") for chart in found.charts.values())
    return {claim.says: claim.answer for claim in found.claims}


def dependence(gains: list[float]) -> dict[str, Any]:
    rows = [
        {"decile": k, "dependence": k / 10, "checkpoints": {
            "a": {"acceptance": 0.9},
            "b": {"acceptance": 0.9 - gain, "gain": gain, "gain_lo": gain - 0.01, "gain_hi": gain + 0.01},
        }}
        for k, gain in enumerate(gains, start=1)
    ]  # fmt: skip
    return {"checkpoints": {"a": {}, "b": {}}, "overall": rows}


@pytest.mark.parametrize(("text", "degrades"), [(2.0, HOLDS), (3.0, FAILS)])
def test_text_only_says_what_was_put_in(text: float, degrades: str):
    run = run_of([1], {"m": head("m"), "t": head("t")}, lambda name, *_: {"m": 3.0, "t": text}[name])
    heads = {"multimodal": "runs/m", "text_only": "runs/t"}
    found = findings_text_only.found(run, heads, dependence([0.0] * 9 + [0.2]))
    less, slower, pays = found.claims
    assert (less.answer, slower.answer, pays.answer) == (degrades, degrades, HOLDS)
    assert [test.what for test in less.tests] == ["overall", *TOPICS]
    assert less.tests[0].value == pytest.approx(3.0 / text, rel=0.03)
    assert answers(found)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.0] * 9 + [0.2], "depend most on the image"),
        ([0.0] * 10, "nowhere"),
        ([0.2] * 9 + [0.0], "do not depend"),
        ([0.1] * 10, "overlap"),
    ],
)
def test_where_a_text_trained_head_lacks(gains: list[float], said: str):
    assert said in findings_text_only.where(findings_text_only.gains(dependence(gains), ["a", "b"]))


@pytest.mark.parametrize(("grows", "answer"), [(0.1, HOLDS), (0.0, FAILS)])
def test_batch_says_what_was_put_in(grows: float, answer: str):
    def speed(name: str, batch: int, n_tokens: int) -> float:
        return {"s": 2.0 * (1 + grows * batch), "b": 2.0, "a": 1.0}[name]

    run = run_of([1, 2, 8], {"s": head("s"), "b": head("b"), "a": head("s", "attention")}, speed)
    found = findings_batch.found(run, {"seeing": "s", "blind": "b"}, ["fixed", "attention"])
    assert found.claims[0].answer == answer
    assert found.claims[0].tests[0].what == "batch 8 over batch 1"
    assert found.claims[1].answer == (HOLDS if grows else FAILS)
    assert answers(found)["The head is faster under attention than with its fixed tree"] == FAILS
    assert found.facts["break_even"]["seeing, fixed"] == 8
    assert found.facts["break_even"]["seeing, attention"] is None


def test_latency_parts_from_throughput_where_long_answers_gain_most():
    def speed(name: str, batch: int, n_tokens: int) -> float:
        return 1.0 + n_tokens / 40 if name == "long" else 3.0

    run = run_of([1, 8], {"long": head("l"), "even": head("e")}, speed)
    found = answers(findings_latency.found(run))
    assert found["The throughput speedup of single requests says more than a typical request gets"] == HOLDS
    assert found["The longest answers gain more than the shortest"] == HOLDS
    assert found["The first token comes sooner too"] == FAILS


def test_latency_and_throughput_agree_where_all_gain_alike():
    run = run_of([1, 8], {"even": head("e")}, lambda *_: 3.0)
    for cell in run.cells.values():  # no prefill: then a request's whole time shrinks alike
        for name, results in cell.items():
            for one in results:
                one.output.latency_s = len(one.output.tokens) / (1 if name == "plain" else 3)
            cell[name] = _with_groups(results)  # type: ignore[index]
    found = answers(findings_latency.found(run))
    assert found["The throughput speedup of single requests says more than a typical request gets"] == FAILS
    assert found["The longest answers gain more than the shortest"] == FAILS
    assert found["Drafting leaves more of a batch waiting for its last row"] == FAILS


def test_choosing_by_throughput_is_told_from_choosing_by_latency():
    rng = np.random.default_rng(0)
    short = rng.random((80, 1)) < 0.7
    # The first is the faster one for short answers, the second for the long ones, which have most of the seconds.
    seconds = np.where(short, [1.0, 1.5], [20.0, 10.0]) * rng.lognormal(0, 0.05, (80, 2))
    rows = np.hstack([seconds, seconds])
    assert family([estimate("x", rows, range(80), findings_latency.chosen(50))])[0].answer == HOLDS
    assert family([estimate("x", rows, range(80), findings_latency.chosen(90))])[0].answer == FAILS


def test_groups_in_which_answers_differ_are_compared_nowhere():
    """Request 9 (group 1 of 8) gets another token by the second method, and absurd seconds with it."""
    run = run_of([1, 8], {"a": head("a"), "b": head("b")}, lambda name, *_: {"a": 2.0, "b": 3.0}[name])
    for batch, cell in run.cells.items():
        one = cell["b"][9]
        one.output.tokens[-1] += 1
        one.output.latency_s = 1e6
        one.output.rounds.extend(one.output.rounds * 1000)
        cell["b"] = _with_groups(cell["b"])  # type: ignore[index]
        rows, clusters = findings_latency._all(run, batch, ["a", "b"])
        assert len(rows) == len(clusters) == 64 - batch
        assert rows.max() < 1
        assert findings_batch._forwards(run, batch, "a", "b")[0].max() < 100
    rows, groups = run.grown(8, 1, "a", "b")
    assert groups == [0, *range(2, 8)]
    assert rows.max() < 10


def test_an_invalid_run_decides_nothing():
    run = run_of([1], {"m": head("m"), "t": head("t")}, lambda name, *_: {"m": 3.0, "t": 2.0}[name])
    bad = Run({**run.summary, "valid": False}, run.cells)
    found = findings_text_only.found(bad, {"multimodal": "m", "text_only": "t"}, dependence([0.0] * 10))
    assert set(answers(found).values()) == {OPEN}
    assert "INVALID" in as_markdown(found)


# ---- the command ----


def test_what_is_not_given_is_trained_and_nothing_else(tmp_path: Path):
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "head.json").write_text("{}")
    (folder / "head.safetensors").write_text("")

    def names(*words: str) -> list[str]:
        args = findings._parse([*words, "--out", str(tmp_path / "out")])
        return [step.name for step in findings.plan(args, findings.heads_of(args))]

    given = f"={folder}"
    assert names("text_only") == ["train eagle", "twin", "train eagle_text", "score text_only", "dependence"]
    assert names("text_only", "--heads", f"multimodal{given}") == names("text_only")[1:]
    assert names("batch") == ["train eagle", "train eagle_blind", "controller", "score batch"]
    assert names("batch", "--policies", "fixed") == ["train eagle", "train eagle_blind", "score batch"]
    assert names("latency", "--heads", f"mine{given}") == ["score latency"]
    assert names("latency") == ["train eagle", "score latency"]
    (folder / "viskip.safetensors").write_text("")
    assert names("batch", "--heads", f"seeing{given}") == ["train eagle_blind", "score batch"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "none"),
        (["batch", "--heads", "seeing"], "NAME=DIR"),
        (["batch", "--heads", "seeing=nowhere"], "holds no head"),
        (["batch", "--batch-size", "2", "3"], "does not divide"),
        (["batch", "--batch-size", "4"], "two values"),
        (["text_only", "--batch-size", "1", "2"], "one --batch-size"),
        (["latency", "--batch-size", "4", "16"], "add 1 to --batch-size 4 16"),
        (["latency", "--methods", "magic"], "magic"),
        (["latency", "--kind", "none"], "none_tiny.yaml"),
        (["text_only", "--set", "optim.lrr=1"], "optim.lrr"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert findings.main([*words, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_twin_has_the_words_and_no_picture():
    sample = Sample("a", (), ("<image>\nWhat is it?", "And <image> this?", "Why?"), (), Path("f"), 1, "t", "Be kind.")
    made = text_twin.twin(sample, Dialogue(("A dog.", "A cat.", "It is"), (True, True, False), 9))
    assert made is not None
    assert [entry["from"] for entry in made["conversations"]] == ["system", "human", "gpt", "human", "gpt"]
    assert [entry["value"] for entry in made["conversations"]][1:] == ["What is it?", "A dog.", "And  this?", "A cat."]
    assert text_twin.twin(sample, Dialogue(("It is",), (False,), 9)) is None


@pytest.mark.slow
def test_all_three_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From training to the paragraph; what is there already is not done again."""
    small = ["--limit", "24", "--steps", "12", "--batch", "4", "--tree", "3,1,3", "--data", "synth:testmini"]
    small += ["--data-limit", "6", "--max-new-tokens", "12", "--out", str(tmp_path), "--results", str(tmp_path / "r")]
    changed = ["data.max_new_tokens=16", "run.eval_prompts=4", "run.eval_max_new_tokens=8", "optim.warmup=1"]
    controller = ["policy.rollouts=16", "policy.steps=10", "policy.rollout_batch=8"]
    words = ["text_only", *small, "--set", *changed]
    assert findings.main(words) == 0
    assert "The paper: speculative decoding made for text-only" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "text_only.jsonl").read_text().splitlines()]
    assert lines
    assert "<image>" not in json.dumps(lines)
    trained = [f"seeing={tmp_path / 'eagle'}", f"blind={tmp_path / 'eagle_text'}"]
    more = ["--set", *changed, "--controller-set", *controller, "--batch-size", "1", "2"]
    assert findings.main(["batch", *small, *more, "--heads", *trained]) == 0
    assert findings.main(["latency", *small, "--heads", trained[0], "--methods", "pld", "--batch-size", "1", "2"]) == 0
    for name in findings.ROLES:
        found = json.loads((tmp_path / "r" / f"{name}.json").read_text())
        assert found["valid"]
        assert found["answer"] in (HOLDS, FAILS, OPEN)
        assert str(tmp_path) not in json.dumps(found)
        assert (tmp_path / "r" / f"{name}.md").stat().st_size > 500
        assert (tmp_path / "r" / f"{name}.svg").read_text().startswith("<svg")
    capsys.readouterr()
    assert findings.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == len([line for line in again.splitlines() if line.startswith("== ")])
