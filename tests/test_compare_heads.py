"""Heads side by side: what a step is done for and done again for, what stops it, and the whole command at toy size."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eval import head_tables, steps, tune_tree
from eval.steps import Ledger, Step, perform
from mmspec.methods import method_names
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
    # What refuses to go on, as an evaluation after an edit of the code, would refuse for ever.
    remedy = f"exit code 3; the same command again goes on with it, or begins it anew where {tmp_path} is removed"
    with pytest.raises(compare_heads.InputError, match=re.escape(remedy)):
        perform(one, Ledger(tmp_path))
    perform(one, Ledger(tmp_path))
    assert ran(tmp_path) == "ss"


def test_what_an_earlier_command_left_is_gone_before_its_successor_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Else an interruption in between would make the next call go on with it."""
    perform(step(tmp_path, made(tmp_path)), Ledger(tmp_path))

    def cut(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "note", cut)
    with pytest.raises(KeyboardInterrupt):
        perform(step(tmp_path, "pass"), Ledger(tmp_path))
    assert not (tmp_path / "s.out").exists()


def waiting(tmp_path: Path, seconds: int) -> str:
    """Code that says its process id in `child`, and waits."""
    return f"import os; open({str(tmp_path / 'child')!r}, 'w').write(str(os.getpid())); time.sleep({seconds});"


def started(tmp_path: Path) -> int:
    """The process id of such a child, once it runs."""
    end = time.monotonic() + 60
    while not ((child := tmp_path / "child").exists() and child.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(child.read_text())


@contextmanager
def told(tmp_path: Path, signum: int, handler: Any) -> Iterator[None]:
    """This process gets a signal as soon as the child runs; `handler` is whose it would be."""
    before = signal.signal(signum, handler)
    teller = threading.Thread(target=lambda: (started(tmp_path), os.kill(os.getpid(), signum)))
    teller.start()
    try:
        yield
    finally:
        teller.join()
        signal.signal(signum, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_the_command_ends_its_step_first(tmp_path: Path, signum: int):
    """The step has a session of its own: nobody else would tell it."""

    def alone(*_: object) -> None:
        raise AssertionError("this process would have died alone")

    with told(tmp_path, signum, alone), pytest.raises(KeyboardInterrupt):
        perform(step(tmp_path, waiting(tmp_path, 60)), Ledger(tmp_path))
    assert not Path(f"/proc/{started(tmp_path)}").exists()


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path: Path):
    """As under nohup."""
    with told(tmp_path, signal.SIGHUP, signal.SIG_IGN):
        perform(step(tmp_path, f"{waiting(tmp_path, 1)} {made(tmp_path)}"), Ledger(tmp_path))
    assert json.loads((tmp_path / "steps.json").read_text())["s"]["done"]


def test_a_step_whose_command_was_killed_is_not_begun_beside_it(tmp_path: Path):
    """The lock lives as long as what runs."""
    one = f"Step('s', (sys.executable, '-c', {f'import time; {waiting(tmp_path, 60)}'!r}), Path({str(tmp_path)!r}))"
    code = "import sys; from pathlib import Path; from eval.steps import Ledger, Step, perform;"
    code += f"perform({one}, Ledger(Path({str(tmp_path)!r})))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=steps.ROOT)
    child = started(tmp_path)
    parent.kill()
    parent.wait()
    try:
        with (tmp_path / "locks" / "s").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.kill(child, signal.SIGKILL)
    with Ledger(tmp_path).alone("s"):
        pass


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


def test_an_interrupted_evaluation_goes_on():
    args = compare_heads._parse([])
    planned = {one.name: one for one in compare_heads.plan(args, compare_heads.entrants(args))}
    assert planned["matched"].resume == planned["tuned"].resume == ("--resume",)


def test_the_best_method_without_training_is_the_fastest_and_stands_where_it_was_measured(tmp_path: Path):
    """The first has the better MAT and is slower for it; its budget was not the table's."""
    first, *_, best = method_names()
    for table in ("matched", "tuned"):
        methods = {name: {"overall": figures(2.0) | {"speedup": 1.2}, "topics": {}} for name in method_names()}
        methods[first]["overall"] |= {"mat": 3.0, "speedup": 1.1}
        methods[best]["overall"] |= {"speedup": 1.3}
        (tmp_path / table).mkdir()
        summary = {"methods": methods, "settings": {"methods": {}}, "hardware": {}}
        (tmp_path / table / "summary.json").write_text(json.dumps(summary))
    found = compare_heads.collect(compare_heads._parse(["--out", str(tmp_path)]), [], Ledger(tmp_path))
    [row] = found["matched"]
    assert (row["head"], row["tree"]) == (f"best training-free ({best})", "defaults; nodes by cost")
    assert found["tuned"] == []


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
    assert [row["head"] for row in found["tuned"]] == ["eagle", "eagle3"]
    assert str(tmp_path) not in (tmp_path / "results" / "heads.json").read_text()
    for name in ("matched.csv", "tuned.svg", "tables.md", "dependence_eagle.svg"):
        assert (tmp_path / "results" / name).stat().st_size > 100
    assert compare_heads.main(words) == 0
    again = capsys.readouterr().out
    assert again.count("done already") == len([line for line in again.splitlines() if line.startswith("== ")])
