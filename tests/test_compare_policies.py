"""The comparison of policies: plans of steps, tables from cells, verdicts; and the whole of it in small (slow)."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from eval import policies
from eval.policy_page import headlines, render
from eval.policy_tables import break_even, headroom_of, judge, markdown, means, plot, rows_of, sentences, skip_quality
from eval.steps import Ledger
from mmspec import checkpoint, metrics
from mmspec.types import InputError
from scripts import compare_policies as command
from tests.browser import CHROMIUM, measure
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
        "settings": {
            "drafter": "eagle",
            "batch": 1,
            "temperature": 0.0,
            "data": "synth:testmini",
            "offer": "12,2,16",
            "max_new_tokens": 256,
            "dtype": "float32",
        },
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
        "hardware": {"cpu": "x", "gpu": None},
    }


def verdicts(files):
    return sentences([judge(found) for found in files])


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


def test_rows_headroom_and_plots_come_from_the_cells():
    found = cell()
    rows = rows_of(found)
    assert {"drafter", "policy", "batch", "temperature", "topic", "speedup", "lo", "hi", "exact_match"} <= set(rows[0])
    room = headroom_of(found)
    assert room[0]["headroom"] == pytest.approx(0.3)
    assert room[0]["captured_P8"] == pytest.approx(0.3 / 0.6)
    assert "| eagle | 1 | 0 | synth:testmini | 1.80 | 2.00 | 2.30 | 2.60 |" in markdown(rows)
    drawn = plot("eagle", [*rows, *rows_of(at(found, batch=4))])
    assert drawn.startswith("<svg")
    assert ">4</text>" in drawn


def table_of(*files):
    """As `collect` makes it."""
    rows = [row for found in files for row in rows_of(found)]
    return {
        "settings": {"offer": "12,1,12", "max_new_tokens": 256, "dtype": "float32", "tune_limit": 32, "set": ["<b>"]},
        "commit": "c" * 40,
        "rows": rows,
        "headroom": [row for found in files for row in headroom_of(found)],
        "promises": [judge(found) for found in files],
        "means": means(rows),
        "break_even": break_even(rows),
        "missing": [],
        "cells": [
            {"commit": "d" * 40, "skips": {"P8": {"precision": 0.5, "recall": None, "n": 7}}, **found}
            for found in files
        ],
    }


def at(found, **how):
    return {**found, "settings": {**found["settings"], **how}}


def test_the_page_shows_what_holds_what_does_not_and_every_cell():
    cells = [at(cell(), batch=1), at(cell(p8=2.05, control=0.03), batch=4), at(cell(ece=0.07), drafter="<sam>")]
    for found in cells:
        found["rows"] += [
            {**row, "topic": topic} for topic in ("a", "b") for row in found["rows"] if row["topic"] == "charts"
        ]
    table = table_of(*cells)
    html = render(table)
    assert "<script" not in html
    assert "http://" not in html
    assert "<sam>" not in html
    assert html.count('class="panel ') == 2, "one a drafter"
    assert html.count("<svg viewBox") >= 1, "of the drafter with two batch sizes"
    assert len(sentences(table["promises"])) == 3
    red = html.count('class="miss"')
    assert red == 3, "captured, own time, calibration"
    assert [list(row["misses"]) for row in table["promises"]] == [[], ["captured", "control"], ["ece"]]
    assert "ddddddd" in html
    assert "Valid." in html
    assert "Invalid" in render(table_of(cell(exact=0.99)))
    said = headlines(table["promises"])
    assert said["n_wide"] == 3
    assert said["n_captured"] == 2
    assert (said["n_ahead"], said["n_against"]) == (3, 3)
    assert said["control"] == 0.03


def test_the_page_takes_cells_without_an_oracle_a_controller_or_intervals():
    found = cell()
    found["rows"] = [
        {**row, "speedup_lo": None, "speedup_hi": None} for row in found["rows"] if row["policy"] in ("P0", "P1")
    ]
    found |= {"against": [], "control": {}, "calibration": {}}
    figures = judge(found)
    assert figures.pop("misses") == {}
    assert {key for key, value in figures.items() if value is not None} == {
        "drafter", "batch", "temperature", "data", "best", "n_judged"
    }  # fmt: skip
    assert "None" not in render({**table_of(found), "settings": {**table_of(found)["settings"], "set": []}})


def test_data_break_even_apart():
    facts = {"drafter": "d", "temperature": 0.0, "policy": "P0", "topic": "overall"}
    rows = [
        {**facts, "data": data, "batch": batch, "speedup": speedup}
        for data, *speedups in (("one", 2.0, 1.2, 0.9), ("other", 2.0, 0.9, None))
        for batch, speedup in zip((1, 4, 8), speedups)
    ]
    assert {row["data"]: row["batch"] for row in break_even(rows)} == {"one": 4, "other": 1}


def test_means_are_geometric_and_of_whole_rows_of_cells():
    facts = {"drafter": "d", "data": "one", "temperature": 0.0, "topic": "overall"}
    speeds = {1: {"P1": 1.0, "P8": 2.0, "P9": 3.0}, 4: {"P1": 4.0, "P8": 4.5}}
    rows = [{**facts, "batch": b, "policy": p, "speedup": s} for b, by in speeds.items() for p, s in by.items()]
    found = {row["policy"]: row for row in means([*rows, {**rows[0], "topic": "charts", "speedup": 9.0}])}
    assert set(found) == {"P1", "P8"}, "one cell has no P9"
    assert found["P1"]["over_plain"] == pytest.approx(2.0)
    assert (found["P8"]["over_plain"], found["P8"]["over_P1"]) == pytest.approx((3.0, 1.5))
    assert found["P8"]["n_cells"] == 2


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


def test_a_head_that_was_trained_anew_is_another_drafter(head: Path, tmp_path: Path):
    """Its controller and costs are made again, and all that depends on them; those of others are not."""

    def keys() -> dict[str, str]:
        ledger = Ledger(tmp_path)
        steps = steps_of(tmp_path / "out", "--heads", f"mine={head}", "--batches", "1", "--no-untrained")
        for step in steps:
            ledger.note(step, done=True)
        return {step.name: ledger.key(step) for step in steps}

    before = keys()
    assert keys() == before
    run_folder(head, llava(dtype="float32", seed=5), checkpoint.DraftTree(3, 2, 5))
    changed = {name for name, key in keys().items() if key != before[name]}
    assert changed == {name for name in before if "mine" in name}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--policies", "P0", "P6"], "--policies P6 needs --blind-controller DIR"),
        (["--batch-size", "4"], "is for batch 1, not 4; tune anew"),
        (["--offer", "4,1,4"], "is for offer 3,1,3, not 4,1,4"),
        (["--tuned", "empty.json"], "is not a file that --tune wrote"),
        (["--tuned", "scores.json"], "is not a file that --tune wrote"),
        (["--tuned", "nowhere.json"], "does not exist; make it with --tune"),
        (["--out", "empty.json/x/y.json"], "cannot be written"),
    ],
)
def test_scoring_refuses_what_does_not_fit(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before a target is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    how = {"drafter": "sam", "batch": 1, "temperature": 0.0, "offer": "3,1,3", "dtype": "float32"}
    (tmp_path / "scores.json").write_text(json.dumps({"best": "P1", "settings": how, "rows": []}))
    (tmp_path / "tuned.json").write_text(json.dumps({"tuned": {"P1": [1, 1]}, "best": "P1", "settings": how}))
    base = ["--method", "sam", "--offer", "3,1,3", "--tuned", "tuned.json", "--target", "nowhere", "--out", "made.json"]
    assert policies.main([*base, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


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


def test_a_missing_cell_is_named_or_left_out_so_far(head: Path, tmp_path: Path):
    words = ["--heads", f"mine={head}", "--methods", "--no-untrained", "--batches", "1", "--long-data", ""]
    words += ["--out", str(tmp_path), "--results", str(tmp_path / "results")]
    args, so_far = command._parse(words), command._parse([*words, "--so-far"])
    for asked in (args, so_far):
        with pytest.raises(InputError, match=r"short\.json is missing"):
            command.collect(asked, command.entrants(asked))
    made = tmp_path / "cells" / "mine_b1_t1" / "short.json"
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps(at(cell(), temperature=1.0)))
    with pytest.raises(InputError, match=r"mine_b1_t0.short\.json is missing"):
        command.collect(args, command.entrants(args))
    assert command.main([*words, "--so-far"]) == 0
    table = json.loads((tmp_path / "results" / "policies.json").read_text())
    assert table["missing"] == ["mine_b1_t0/short"]
    assert {row["drafter"] for row in table["rows"]} == {"mine"}
    assert "Not scored yet: mine_b1_t0/short." in (tmp_path / "results" / "policies" / "index.html").read_text()
    two = [word for word in words if word != "1"]
    two[two.index("--batches") + 1 : two.index("--batches") + 1] = ["1", "4"]
    assert command.main([*two, "--so-far"]) == 0, "no line can be drawn of one batch size"
    assert not list((tmp_path / "results").rglob("*.svg"))
    (tmp_path / "cells" / "mine_b4_t1").mkdir()
    found = at(cell(), batch=4, temperature=1.0)
    (tmp_path / "cells" / "mine_b4_t1" / "short.json").write_text(json.dumps(found))
    assert command.main([*two, "--so-far"]) == 0
    assert [path.name for path in (tmp_path / "results").rglob("*.svg")] == ["mine_t1.svg"]


def test_cells_of_another_machine_are_kept_where_this_one_has_none(head: Path, tmp_path: Path):
    """And their place; what this machine has is its own, and all that is computed of rows is computed anew."""
    words = ["--heads", f"mine={head}", "--methods", "--no-untrained", "--batches", "1", "--temperatures", "0"]
    words += ["--long-data", "", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "results"), "--so-far"]
    made = tmp_path / "out" / "cells" / "mine_b1_t0" / "short.json"
    made.parent.mkdir(parents=True)
    made.write_text(json.dumps(cell(p8=2.05)))
    with pytest.raises(InputError, match=r"--keep: there is no .*policies\.json"):
        command.collect(command._parse([*words, "--keep"]), [])
    there = [at(cell(control=0.03), **how) for how in ({}, {"drafter": "mine"}, {"drafter": "mine", "batch": 4})]
    old = {**table_of(*there), "costs": {"eagle": [{"hardware": "cpu-x"}], "mine": []}, "controllers": {"eagle": {}}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "policies.json").write_text(command.in_lines(old))
    assert command.main([*words, "--keep"]) == 0
    table = json.loads((tmp_path / "results" / "policies.json").read_text())
    facts = [(c["settings"]["drafter"], c["settings"]["batch"], c["control"]["P8"]) for c in table["cells"]]
    assert facts == [("eagle", 1, 0.03), ("mine", 1, 0.01), ("mine", 4, 0.03)]
    assert [list(row["misses"]) for row in table["promises"]] == [["control"], ["captured"], ["control"]]
    speeds = [row["speedup"] for row in table["rows"] if (row["policy"], row["topic"]) == ("P8", "overall")]
    assert speeds == [2.3, 2.05, 2.3]
    assert next(r for r in table["means"] if r["drafter"] == "mine" and r["policy"] == "P8")["n_cells"] == 2
    assert table["costs"] == {"eagle": [{"hardware": "cpu-x"}], "mine": []}
    assert table["missing"] == []
    again = command.collect(command._parse([*words, "--keep"]), command.entrants(command._parse(words)))
    assert len(again["rows"]) == len(table["rows"]), "twice is once"
    with pytest.raises(InputError, match=r"has cells of --dtype float32, not float64; give another --results"):
        command.collect(command._parse([*words, "--keep", "--dtype", "float64"]), [])


def test_an_entry_of_the_table_is_a_line():
    table = {"rows": [{"a": 1.5, "b": [1, 2]}, {"a": None}], "commit": "c", "missing": []}
    said = command.in_lines(table)
    assert json.loads(said) == table
    assert '\n{"a":1.5,"b":[1,2]},\n{"a":null}\n' in said


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH to look at pages with")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_on_the_page_is_cut_off_overlaps_or_is_hard_to_read(tmp_path: Path, dark: bool):
    bins = [[0.2, 0.1, 30], [0.9, 0.8, 40]]
    depths = [{"depth": k, "n": 500, "ece": 0.07, "honest": 0.02, "brier": 0.1, "bins": bins} for k in (1, 2, 4)]
    cells = [
        {**at(cell(p8=2.05), batch=batch, drafter=name), "calibration": {"P8": depths}}
        for name in ("eagle", "untrained")
        for batch in (1, 4, 8)
    ]
    page = tmp_path / "index.html"
    page.write_text(render(table_of(*cells)), encoding="utf-8")
    script = (Path(__file__).parent / "measure_page.js").read_text()
    views, console = measure([(page, 1280), (page, 390)], dark, script)
    for view in views:
        assert {"cell-0", "cell-1"} <= set(dict(view["states"]))
        assert view["wrong"] == []
    assert console == []


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
