"""All methods side by side: who takes part, what equal budgets are, what is tuned; and the whole of it (slow)."""

# ruff: noqa: F811
from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval import head_tables, tune_tree
from mmspec import checkpoint
from mmspec.checkpoint import DraftTree
from mmspec.methods import make_method, method_names, read_settings
from mmspec.static_tree import EAGLE_25, TOKEN_RECYCLING_80, StaticTree
from scripts import compare_heads, compare_methods
from scripts._method_tables import FREE, HEADS, ORDER, STEERED
from tests import tiny
from tests.test_eval_dependence import folders  # noqa: F401


@pytest.fixture
def named(tmp_path: Path) -> list[str]:
    """An EAGLE head of a random target, alone and as the one with the controller."""
    folder = tiny.run_folder(tmp_path / "source", tiny.llava(), DraftTree(4, 3, 6))
    return [f"eagle={folder}", f"viskip={folder}", "--out", str(tmp_path / "runs")]


def args_of(*words: str) -> Any:
    return compare_methods._parse(["--heads", *words])


def wrote(tmp_path: Path) -> None:
    """What fits and tuning leave."""
    for name, best in {
        "eagle": {"depth": 9, "width": 1, "budget": 9}, "viskip": {"depth": 5, "width": 2, "budget": 8},
        "eagle_static": {"nodes": 16}, "pld": {"settings": {"num_pred": 4}}, "sam": {"settings": {}},
        "lookahead": {"settings": {"max_query": 4}}, "recycling": {"settings": {"seed_prompt": False}},
    }.items():  # fmt: skip
        path = tmp_path / "runs" / "tuning" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(path, {"best": best})
    fitted = tmp_path / "runs" / "fitted"
    fitted.mkdir()
    checkpoint.write_json(fitted / "eagle.json", {"paths": EAGLE_25.paths})
    checkpoint.write_json(fitted / "recycling_10.json", {"paths": TOKEN_RECYCLING_80.paths[:10]})


def test_every_method_of_the_benchmark_has_its_place_in_the_tables() -> None:
    assert set(FREE) == set(method_names()) - {"lade"}, "lookahead decoding by Jacobi is none of the benchmark's"
    assert set(ORDER) == {*HEADS.values(), *STEERED.values(), *FREE.values()}
    assert len(ORDER) == 12


def test_steps_are_in_order_and_tables_come_last(named: list[str]) -> None:
    args = args_of(*named)
    heads = compare_methods.entrants(args)
    steps = compare_methods.plan(args, heads)
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    assert names[-2:] == ["matched", "tuned"]
    assert {"fit eagle", "fit recycling", "tune eagle", "tune eagle_static", "tune viskip"} <= set(names)
    assert {f"tune {name}" for name in FREE} <= set(names)
    matched, tuned = steps[-2:]
    assert set(tuned.after) == {name for name in names if name.startswith("tune ")}
    assert set(matched.after) == {"fit eagle", "fit recycling"}
    for step in steps[:-2]:
        assert args.tune_data in step.words, "nothing is fitted or tuned on what is reported"
        assert args.data not in step.words
    assert matched.words.count("--ckpt") == 2
    assert matched.words[matched.words.index("--policies") + 1 :][:3] == ("fixed", "static", "viskip")


def test_what_was_tuned_and_scored_with_a_controller_is_done_again_when_that_was_trained_anew(
    named: list[str], tmp_path: Path
) -> None:
    args = args_of(*named)
    steps = compare_methods.plan(args, compare_methods.entrants(args))
    for file, readers in {
        "head.safetensors": {"fit eagle", "tune eagle_static", "tune eagle", "tune viskip", "matched", "tuned"},
        "viskip.safetensors": {"tune viskip", "matched", "tuned"},
    }.items():
        assert {step.name for step in steps if tmp_path / "source" / file in step.reads} == readers


def test_equal_budgets_are_equal_and_tuned_ones_are_what_was_best(named: list[str], tmp_path: Path) -> None:
    args = args_of(*named)
    heads = compare_methods.entrants(args)
    before = (tmp_path / "source" / "tree.json").read_text()
    wrote(tmp_path)
    for table in ("matched", "tuned"):
        compare_methods.prepare(args, table, heads)
        settings = read_settings(tmp_path / "runs" / f"{table}.yaml")
        trees = {head.name: checkpoint.load(head.folder(args, table)).tree for head in heads}
        static = StaticTree.load(heads[0].folder(args, table) / "static_tree.json")
        budgets = {name: make_method(name, tiny.llava(), settings.get(name))[1].max_budget for name in FREE}
        if table == "matched":
            assert trees == dict.fromkeys(("eagle", "viskip"), DraftTree(7, 2, 10))
            assert static.budget == 10
            assert set(budgets.values()) == {10}
        else:
            assert trees == {"eagle": DraftTree(9, 1, 9), "viskip": DraftTree(5, 2, 8)}
            assert static.paths == EAGLE_25.paths[:16]
            assert budgets["pld"] == 4
            assert "sam" not in settings
        assert checkpoint.load(heads[0].folder(args, table)).viskip is None, "the controller is ViSkip's alone"
        assert checkpoint.load(heads[1].folder(args, table)).viskip is not None
    assert (tmp_path / "source" / "tree.json").read_text() == before
    assert sorted(path.name for path in (tmp_path / "source").iterdir()) == [
        "head.json", "head.safetensors", "tree.json", "viskip.json", "viskip.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "eagle"], "NAME=DIR"),
        (["--heads", "nobody=x"], "nobody=x"),
        (["--heads", "eagle=/nowhere/x"], "does not exist"),
        (["--tree", "5,2"], "5,2"),
        (["--tune-data", "synth:test"], "tune on something else"),
        (["--data-limit", "0"], "--data-limit"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_methods.main([*words, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_head_of_another_kind_or_without_controller_is_refused(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = named[0].partition("=")[2]
    assert compare_methods.main(["--heads", f"msd={folder}", "--out", str(tmp_path / "o")]) == 2
    assert "a head of kind eagle, not msd" in capsys.readouterr().err
    for name in ("viskip.json", "viskip.safetensors"):
        (Path(folder) / name).unlink()
    assert compare_methods.main(["--heads", f"viskip={folder}", "--out", str(tmp_path / "o")]) == 2
    assert "has no controller" in capsys.readouterr().err


def test_settings_of_a_method_and_nodes_of_a_static_tree_are_tuned(
    folders: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "tuned.json"
    small = ["--limit", "6", "--max-new-tokens", "10", "--data", "synth:testmini", "--out", str(out)]
    words = ["--method", "pld", "--method-budget", "fixed", "--grid", "{num_pred: 3}", "{num_pred: 6, min_ngram: 2}"]
    assert tune_tree.main([*words, *small]) == 0
    found = json.loads(out.read_text())
    assert [one["settings"] for one in found["tried"]] == [{"num_pred": 3}, {"num_pred": 6, "min_ngram": 2}]
    best = max(found["tried"], key=lambda one: one["speedup"])
    assert found["best"] == {"settings": best["settings"]}
    assert found["settings"]["steered_by"] == "fixed"
    tree = tmp_path / "tree.json"
    checkpoint.write_json(tree, {"paths": EAGLE_25.paths})
    ckpt = ["--ckpt", str(folders[0]), "--static", str(tree)]
    assert tune_tree.main([*ckpt, "--grid", "4", "9", "99", *small]) == 0
    found = json.loads(out.read_text())
    assert [one["nodes"] for one in found["tried"]] == [4, 9, 25], "there are no more than 25"
    assert all(one["exact_match"] == 1 for one in found["tried"])
    capsys.readouterr()
    for words, said in (
        (["--method", "pld", "--grid", "{num_prd: 3}"], "num_pred"),
        (["--method", "pld", "--grid", "3,1,3"], "no mapping of settings"),
        ([*ckpt, "--grid", "3,1,3"], "numbers of nodes"),
        ([], "--ckpt DIR or --method NAME"),
        (["--method", "pld", "--static", str(tree)], "--static goes with --ckpt"),
    ):
        assert tune_tree.main([*words, *small]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_speedups_are_drawn_with_their_intervals() -> None:
    figures = {"speedup": 2.0, "speedup_lo": 1.5, "speedup_hi": 2.5}
    svg = head_tables.speedup_plot("a < b", [{"head": "x & y", "overall": figures}])
    assert "a &lt; b" in svg
    assert "x &amp; y: 2.00x" in svg
    assert svg.count('class="span"') == svg.count('class="bar"') == 1


@pytest.mark.slow
def test_the_whole_comparison_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a head trained for a moment to both tables; the second time nothing is done again."""
    short = ["--limit", "24", "--steps", "20", "--batch", "4", "--procs", "1", "--heads", "eagle", "--no-blind"]
    changed = ["data.max_new_tokens=16", "run.eval_prompts=4", "run.eval_max_new_tokens=8", "loss.steps=2"]
    trained = tmp_path / "trained"
    once = [*short, "--only", "prepared", "train", "--out", str(trained), "--set", *changed, "optim.warmup=1"]
    assert compare_heads.main(once) == 0
    words = ["--heads", f"eagle={trained / 'eagle'}", "--data", "synth:testmini", "--data-limit", "6"]
    words += ["--tune-limit", "6", "--max-new-tokens", "12", "--tree", "3,2,5", "--grid", "2,1,2", "--static-grid", "3"]
    words += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert compare_methods.main(words) == 0
    said = capsys.readouterr().out
    assert "Matched budget: 5 draft nodes for all, trees 3,2,5" in said
    found = json.loads((tmp_path / "results" / "methods.json").read_text())
    wanted = [STEERED["eagle_static"], HEADS["eagle"], *FREE.values()]
    for table in ("matched", "tuned"):
        assert [row["head"] for row in found[table]] == wanted
        assert all(row["overall"]["exact_match"] == 1 for row in found[table])
        with (tmp_path / "results" / f"{table}.csv").open() as file:
            assert len(list(csv.DictReader(file))) == len(wanted) * 7
    assert [row["budget"] for row in found["matched"]][:3] == ["5 nodes", "3,2,5", "n_predicts 6"]
    assert [row["budget"] for row in found["tuned"]][:2] == ["3 nodes", "2,1,2"]
    assert str(tmp_path) not in (tmp_path / "results" / "methods.json").read_text() + said.split("## ")[1]
    assert yaml.safe_load((tmp_path / "runs" / "matched.yaml").read_text())["pld"] == {"num_pred": 5}
    assert compare_methods.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == len([line for line in again.splitlines() if line.startswith("== ")])
