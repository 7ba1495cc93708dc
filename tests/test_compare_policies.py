"""The comparison of policies: plans of steps, tables from cells, verdicts; and the whole of it in small (slow)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eval.policy_tables import break_even, headroom_of, markdown, page, plot, rows_of, skip_quality, verdicts
from mmspec import checkpoint, metrics
from mmspec.types import InputError
from scripts import compare_policies as command
from tests.tiny import llava, run_folder

TOPICS = ("overall", "charts")


def cell(p8=2.3, hi=2.4, ratio_hi=1.1, exact=1.0, oracle=2.6, control=0.01, ece=0.01, attention_lo=1.05):
    """What eval.policies writes, with one thing or another wrong."""
    rows = []
    for topic in TOPICS:
        for policy, speed in (("P0", 1.8), ("P1", 2.0), ("P8", p8), ("P9", oracle)):
            spans = {"speedup": speed, "speedup_lo": speed - 0.1, "speedup_hi": hi if policy == "P8" else speed + 0.1}
            row = {"policy": policy, "topic": topic, **spans, "exact_match": exact, "mat": 3.0}
            rows.append({**row, "skip_rate": 0.1, "draft_efficiency": 0.4, "n_requests": 9})
            if policy == "P9":
                rows[-1] |= {"exact_match": None, "speedup_lo": None, "speedup_hi": None}
    return {
        "settings": {"drafter": "eagle", "batch": 1, "temperature": 0.0, "data": "synth:testmini"},
        "best": "P1",
        "rows": rows,
        "against": [
            {"policy": "P8", "over": over, "topic": t, "ratio": 1.1, "lo": lo, "hi": ratio_hi}
            for over, lo in (("P1", 1.0), ("P2", attention_lo))
            for t in TOPICS
        ],
        "control": {"P8": control},
        "calibration": {"P8": [{"depth": 1, "n": 500, "ece": ece, "honest": 0.02, "brier": 0.1, "bins": []}]},
        "contention": {"unreliable": False},
        "hardware": {"cpu": "x"},
    }


def test_verdicts_name_what_does_not_hold_and_nothing_else():
    assert verdicts([cell()]) == []
    assert any("at most 0.960 of plain" in line for line in verdicts([cell(hi=0.96)]))
    assert any("at most 0.970 of P1" in line for line in verdicts([cell(ratio_hi=0.97)]))
    assert any("exact_match 0.9900" in line for line in verdicts([cell(exact=0.99)]))
    assert verdicts([cell(p8=2.05)]) == ["eagle batch 1 T 0 synth:testmini: P8 has 8% of a headroom of 30.0%"]
    assert verdicts([cell(p8=2.0, oracle=2.04)]) == [], "a small headroom need not be captured"
    few = cell(hi=0.96, ratio_hi=0.97)
    few["settings"]["batch"] = 4
    assert verdicts([few]) == [], "nine requests of one topic are three batches: too few to be judged"
    few["rows"] += [{**row, "topic": "text vqa"} for row in few["rows"] if row["topic"] == "charts"]
    assert all(": P8 " in line for line in verdicts([few])), "of two topics there are six, together"
    assert len(verdicts([few])) == 2
    threshold = "eagle batch 1 T 0 synth:testmini: P8 is not surely ahead of P2: 1.100 [0.990, 1.100]"
    assert verdicts([cell(attention_lo=0.99)]) == [threshold]
    assert verdicts([cell(p8=2.0, oracle=2.04, attention_lo=0.99)]) == [], "where there is something to gain"
    assert any("3.0% of the time" in line for line in verdicts([cell(control=0.03)]))
    assert any("0.070 (ECE, of which 0.020 is chance) at depth 1" in line for line in verdicts([cell(ece=0.07)]))


def test_rows_headroom_and_page_come_from_the_cells():
    found = cell()
    rows = rows_of(found)
    assert {"drafter", "policy", "batch", "temperature", "topic", "speedup", "lo", "hi", "exact_match"} <= set(rows[0])
    room = headroom_of(found)
    assert room[0]["headroom"] == pytest.approx(0.3)
    assert room[0]["captured_P8"] == pytest.approx(0.3 / 0.6)
    assert "| eagle | 1 | 0 | synth:testmini | 1.80 | 2.00 | 2.30 | 2.60 |" in markdown(rows)
    drawn = plot("eagle", 0.0, "synth:testmini", rows)
    assert drawn.startswith("<svg")
    table = {"rows": rows, "headroom": room, "verdicts": ["<b>"]}
    html = page(table, {"one": drawn})
    assert "&lt;b&gt;" in html
    assert "http://" not in html.replace("http://www.w3.org", "")


def test_data_break_even_apart():
    facts = {"drafter": "d", "temperature": 0.0, "policy": "P0", "topic": "overall"}
    rows = [
        {**facts, "data": data, "batch": batch, "speedup": speedup}
        for data, *speedups in (("one", 2.0, 1.2, 0.9), ("other", 2.0, 0.9, None))
        for batch, speedup in zip((1, 4, 8), speedups)
    ]
    assert {row["data"]: row["batch"] for row in break_even(rows)} == {"one": 4, "other": 1}


def test_calibration_is_zero_for_honest_chances_and_the_difference_for_others():
    honest = [([0.25], 1)] * 25 + [([0.25], 0)] * 75
    assert metrics.calibration(honest)[0]["ece"] == pytest.approx(0.0)
    dice = random.Random(0)
    right = [([q], int(dice.random() < q)) for q in (dice.random() for _ in range(4000))]
    few = [metrics.calibration(right[start : start + 100])[0] for start in range(0, 4000, 100)]
    shown, said = (sum(row[key] for row in few) / len(few) for key in ("ece", "honest"))
    assert said == pytest.approx(shown, rel=0.1), "exact chances of a hundred levels are not without error"
    assert said > 0.05
    boastful = [([0.95, 0.5], 0)] * 10
    first, second = metrics.calibration(boastful)
    assert first["ece"] == pytest.approx(0.95)
    assert (second["depth"], second["n"]) == (2, 10)
    quality = skip_quality([([0.1], 0)] * 3 + [([0.2], 1)] + [([0.9], 0)])
    assert quality == {"precision": 0.75, "recall": 0.75, "n": 5}


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return run_folder(tmp_path / "head", llava(dtype="float32"), checkpoint.DraftTree(3, 2, 5))


def steps_of(out: Path, *words: str):
    args = command._parse(["--out", str(out), *words])
    return command.plan(args, command.entrants(args))


def test_every_cell_is_tuned_before_it_is_scored_and_controllers_share_a_rollout(head: Path, tmp_path: Path):
    words = ("--heads", f"mine={head}", "--batches", "1", "4", "--temperatures", "0", "1")
    steps = steps_of(tmp_path / "out", *words)
    names = [step.name for step in steps]
    assert len(names) == len(set(names))
    for step in steps:
        assert all(name in names[: names.index(step.name)] for name in step.after), step.name
    scores = [step for step in steps if step.name.startswith("score")]
    assert len(scores) == (2 * 2 + 1) * 2 * 2  # the head and sam, short and long; an untrained one, short
    assert {word for step in scores for word in step.words} >= {"P9", "--scalars-controller", "synth:test"}
    untrained = [step for step in steps if step.name.startswith("score untrained")]
    for step in untrained:
        assert {"P0", "P4", "marginal", "P7", "P8"} <= set(step.words)
        assert not {"P5", "P6", "P9", "--scalars-controller"} & set(step.words), "nobody asks that of it"
    assert [name for name in names if name.startswith("controller untrained")] == ["controller untrained full"]
    tuning = next(step for step in steps if step.name.startswith("tune"))
    said = dict(zip(tuning.words, tuning.words[1:]))
    assert (said["--limit"], said["--max-new-tokens"], tuning.words.count("--max-new-tokens")) == ("32", "128", 1)
    assert all(dict(zip(step.words, step.words[1:]))["--max-new-tokens"] == "256" for step in scores)
    shared = next(step for step in steps if step.name == "controller mine scalars")
    assert any(word.startswith("policy.rollouts_from=") and "mine_full" in word for word in shared.words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "a=/nowhere"], "holds no head"),
        (["--heads", "a"], "NAME=DIR"),
        (["--methods", "sma"], "sma is unknown"),
        (["--shard", "3/2"], "--shard 3/2"),
        (["--batches", "0"], "--batches must be at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert command.main([*words, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_missing_cell_is_named(head: Path, tmp_path: Path):
    args = command._parse(["--heads", f"mine={head}", "--methods", "--no-untrained", "--out", str(tmp_path)])
    with pytest.raises(InputError, match=r"short\.json is missing"):
        command.collect(args, command.entrants(args))


@pytest.mark.slow
def test_the_whole_comparison_in_small(tmp_path: Path):
    """Real controllers, costs, tuning and scores of SAM on the embedded target: table, page and plots are there."""
    out = tmp_path / "out"
    small = ["--batches", "1", "--temperatures", "0", "--data-limit", "2", "--tune-limit", "1", "--long-data", ""]
    sets = ["policy.rollouts=8", "policy.steps=3", "data.sources=[{path: 'synth:train', limit: 8}]"]
    words = ["--heads", "--methods", "sam", *small, "--max-new-tokens", "24", "--out", str(out)]
    words += ["--results", str(tmp_path / "results"), "--offer", "4,1,4", "--set", *sets]
    assert command.main(words) == 0
    table = json.loads((tmp_path / "results" / "policies.json").read_text())
    policies = {row["policy"] for row in table["rows"]}
    assert policies == {"P0", "P1", "P2", "P3", "P4", "marginal", "P5", "P6", "P7", "P8", "P9"}
    assert all(row["exact_match"] == 1.0 for row in table["rows"] if row["policy"] != "P9")
    assert (tmp_path / "results" / "policies" / "index.html").is_file()
    assert command.main(words) == 0  # everything is done: nothing is done again
