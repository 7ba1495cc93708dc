"""Heads side by side: what a step is done for and done again for, what stops it, and the whole command at toy size."""

from __future__ import annotations

import csv
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from eval import head_tables, steps, tune_tree
from eval.steps import Ledger, Step, perform
from scripts import compare_heads
from tests.test_eval_dependence import folders  # noqa: F401


def step(tmp_path: Path, code: str, name: str = "s", **more: Any) -> Step:
    """A step that runs Python and notes in `log` that it did."""
    log = f"open({str(tmp_path / 'log')!r}, 'a').write({name!r});"
    return Step(name, (sys.executable, "-c", f"import sys, time; {log} {code}"), tmp_path / f"{name}.out", **more)


def ran(tmp_path: Path) -> str:
    return (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""


def made(tmp_path: Path, name: str = "s", text: str = "x") -> str:
    return f"open({str(tmp_path / f'{name}.out')!r}, 'w').write({text!r})"


def test_a_step_is_done_once_and_again_when_it_or_what_it_reads_changed(tmp_path: Path):
    a, b = step(tmp_path, made(tmp_path, "a"), "a"), step(tmp_path, made(tmp_path, "b"), "b", after=("a",))
    for _ in range(2):
        for one in (a, b):
            perform(one, Ledger(tmp_path))
    assert ran(tmp_path) == "ab"
    perform(step(tmp_path, made(tmp_path, "a", "other"), "a"), Ledger(tmp_path))
    perform(b, Ledger(tmp_path))
    assert ran(tmp_path) == "abab"
    (tmp_path / "b.out").unlink()
    perform(b, Ledger(tmp_path))
    assert ran(tmp_path) == "ababb"


def test_of_a_folder_of_its_own_a_changed_step_finds_nothing(tmp_path: Path):
    own = tmp_path / "own"
    for text in ("x", "y"):
        code = f"import pathlib; p = pathlib.Path({str(own)!r}); p.mkdir(); {made(tmp_path, text=text)}"
        perform(step(tmp_path, code, owns=own), Ledger(tmp_path))
    assert ran(tmp_path) == "ss"


def test_a_step_is_done_again_when_a_file_it_reads_has_changed(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    one = step(tmp_path, made(tmp_path), reads=(recipe,))
    for text in ("lr: 1", "lr: 1", "lr: 2"):
        recipe.write_text(text)
        perform(one, Ledger(tmp_path))
    assert ran(tmp_path) == "ss"


def test_a_step_that_goes_on_behind_its_limit_gets_time_to_save(tmp_path: Path):
    """It was killed when all of its time was spent and nothing was saved: no time at all would be a dead end."""
    late = step(tmp_path, "", limit_s=60.0)
    assert [late.left_s(spent, True) for spent in (0.0, 59.0, 600.0)] == [steps.GRACE_S] * 3
    assert [late.left_s(spent, False) for spent in (0.0, 600.0)] == [60.0, 0.0]
    assert step(tmp_path, "").left_s(600.0, True) is None


def test_settings_name_no_place_of_this_machine(tmp_path: Path):
    words = ["--data", str(tmp_path / "mine"), "--set", f"data.answers_dir={tmp_path / 'a'}", "--tree", "3,2,5"]
    found = steps.options(compare_heads._parse(words))
    assert str(tmp_path) not in json.dumps(found)
    assert found["data"] == ".../mine"
    assert found["set"] == ["data.answers_dir=.../a"]
    assert found["tree"] == "3,2,5"


def test_commands_beside_each_other_keep_one_ledger_and_do_no_step_twice(tmp_path: Path):
    """Threads with ledgers of their own stand for processes: a lock of a file opened anew holds between them too."""
    slow = [step(tmp_path, f"time.sleep(0.3); {made(tmp_path, name)}", name) for name in "abc"]
    threads = [
        threading.Thread(target=lambda order=order: [perform(one, Ledger(tmp_path)) for one in order])
        for order in (slow, slow[1:], slow[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ran(tmp_path)) == ["a", "b", "c"]
    assert all(entry["done"] for entry in json.loads((tmp_path / "steps.json").read_text()).values())


def test_an_interrupted_step_goes_on_with_the_words_for_it(tmp_path: Path):
    code = f"{made(tmp_path)} if 'again' in sys.argv else sys.exit(3)"
    one = step(tmp_path, code, resume=("again",))
    with pytest.raises(compare_heads.InputError, match="exit code 3"):
        perform(one, Ledger(tmp_path))
    perform(one, Ledger(tmp_path))
    assert ran(tmp_path) == "ss"


def test_what_is_over_its_limit_is_stopped_with_its_children_and_kept_if_it_saved(tmp_path: Path):
    code = (
        "import signal, subprocess; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid));"
        f"signal.signal(signal.SIGTERM, lambda *_: ({made(tmp_path)}, child.wait(), sys.exit(143)));"
        "time.sleep(60)"
    )
    ledger, start = Ledger(tmp_path), time.monotonic()
    perform(step(tmp_path, code, limit_s=2), ledger)
    assert time.monotonic() - start < 30
    assert not Path(f"/proc/{(tmp_path / 'child').read_text()}").exists()
    entry = json.loads((tmp_path / "steps.json").read_text())["s"]
    assert entry["stopped"]
    assert entry["seconds"] >= 2
    perform(step(tmp_path, code, limit_s=2), ledger)
    assert ran(tmp_path) == "s"


def figures(mat: float) -> dict[str, Any]:
    return {
        "mat": mat, "speedup": 2.0, "speedup_lo": 1.9, "speedup_hi": None, "exact_match": 1.0, "n_requests": 3,
        "accept_by_depth": [0.9, 0.5],
    }  # fmt: skip


def test_tables_say_what_summaries_say():
    summary = {"methods": {"eagle": {"overall": figures(4.0), "topics": {"chart": figures(3.5)}}}}
    rows = [head_tables.row("eagle", summary, "eagle", {"tree": "5,2,7", "steps": 600})]
    rows.append(head_tables.row("bad", {**summary, "contention": {"unreliable": True}}, "eagle", {}))
    text = head_tables.markdown("T", rows)
    assert "| eagle | 5,2,7 | 600 | 4.00 | 2.00 [1.90, -] | 1.000 | 3.50 / 2.00 |" in text
    assert "unreliable: bad" in text
    lines = list(csv.DictReader(head_tables.as_csv(rows).splitlines()))
    assert [(line["head"], line["topic"], line["mat"]) for line in lines[:2]] == [
        ("eagle", "overall", "4.0"), ("eagle", "chart", "3.5"),
    ]  # fmt: skip
    assert lines[0]["speedup_hi"] == ""
    assert "eagle" in head_tables.depth_plot("T", rows)


def test_a_head_joins_by_its_recipe_alone():
    args = compare_heads._parse([])
    names = [entrant.name for entrant in compare_heads.entrants(args)]
    assert {"eagle", "eagle_blind", "eagle3", "eagle3_blind"} <= set(names)
    assert not {"viskip", "adapt_lora"} & set(names)
    steps = [one.name for one in compare_heads.plan(args, compare_heads.entrants(args))]
    assert len(steps) == len(set(steps))
    assert {name.split()[0] for name in steps} == set(compare_heads.STAGES)
    assert steps.index("train eagle3") < steps.index("tune eagle3") < steps.index("tuned")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heads", "none"], "--heads none"),
        (["--tree", "5,2"], "5,2"),
        (["--steps", "0"], "--steps"),
        (["--minutes", "0"], "--minutes"),
        (["--batch", "3"], "--procs"),
        (["--set", "optim.lrr=1"], "optim.lrr"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare_heads.main([*words, "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_tree_that_pays_best_is_found(folders, tmp_path: Path):  # noqa: F811
    out = tmp_path / "tuned.json"
    words = ["--ckpt", str(folders[0]), "--out", str(out), "--grid", "2,1,2", "2,2,4", "--limit", "6"]
    assert tune_tree.main([*words, "--max-new-tokens", "10", "--data", "synth:testmini"]) == 0
    found = json.loads(out.read_text())
    assert len(found["tried"]) == 2
    best = max(found["tried"], key=lambda tree: tree["speedup"])
    assert found["best"] == {key: best[key] for key in ("depth", "width", "budget")}
    assert all(tree["exact_match"] == 1 for tree in found["tried"])


@pytest.mark.slow
def test_the_whole_comparison_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two heads and their twins, from answers to tables; the second time nothing is done again."""
    small = ["--limit", "24", "--steps", "20", "--batch", "4", "--procs", "1", "--tree", "3,2,5", "--grid", "2,1,2"]
    small += ["--data", "synth:testmini", "--data-limit", "6", "--tune-limit", "6", "--max-new-tokens", "12"]
    small += ["--heads", "eagle", "eagle3", "--tune-data", "synth:testmini"]
    changed = ["data.max_new_tokens=16", "run.eval_prompts=4", "run.eval_max_new_tokens=8", "loss.steps=2"]
    changed += ["optim.warmup=1"]  # enough to be right once: of a head that never is no static tree can be fitted
    words = [*small, "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--set", *changed]
    assert compare_heads.main(words) == 0
    said = capsys.readouterr().out
    assert "Matched budget: depth, width, nodes 3,2,5" in said
    found = json.loads((tmp_path / "results" / "heads.json").read_text())
    names = [row["head"] for row in found["matched"]]
    assert names[:5] == ["eagle", "eagle_static", "eagle_blind", "eagle3", "eagle3_blind"]
    assert names[5].startswith("best training-free")
    assert all(row["overall"]["exact_match"] == 1 for row in found["matched"] + found["tuned"])
    assert {row["tree"] for row in found["tuned"] if "tree" in row} == {"2,1,2"}
    assert {row["steps"] for row in found["matched"][:5]} == {20}
    assert [row["head"] for row in found["tuned"]][:3] == ["eagle", "eagle3", names[5]]
    assert str(tmp_path) not in (tmp_path / "results" / "heads.json").read_text()
    for name in ("matched.csv", "tuned.svg", "tables.md", "dependence_eagle.svg"):
        assert (tmp_path / "results" / name).stat().st_size > 100
    assert compare_heads.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == len([line for line in again.splitlines() if line.startswith("== ")])
