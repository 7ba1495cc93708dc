"""Tables of an evaluation: every cell, method and topic once, the summary's own figures, and the same in W&B."""

# ruff: noqa: F811
from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval import show, tables, wandb_log
from tests.test_eval_runs import data, evaluate, run_folder, summary_of  # noqa: F401


def test_a_table_keeps_its_shape_whatever_its_cells_hold() -> None:
    text = tables.markdown(["a", "b|c"], [["x\ny", 1], [None, "|"]])
    assert text.splitlines() == ["| a | b\\|c |", "| --- | --- |", "| x y | 1 |", "| None | \\| |"]
    assert tables.as_csv(["a"], [[None], ["x,y"]]) == 'a\n""\n"x,y"\n'


def test_a_run_writes_a_row_for_each_cell_method_and_topic(
    evaluate: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert evaluate("--method", "pld", "--batch-size", "1", "2") == 0
    summary = summary_of(out)
    with (out / "tables.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4, "cells x methods x topics, the whole among them"
    for row in rows:
        cell = next(c for c in summary["cells"] if c["batch_size"] == int(row["batch_size"]))
        found = cell["methods"][row["method"]]
        figures = found["overall"] if row["topic"] == "overall" else found["topics"][row["topic"]]
        for name in tables.FIGURES:
            assert row[name] == ("" if figures[name] is None else str(figures[name]))
    page = (out / "tables.md").read_text()
    assert page.count("\n| overall |") == 2 * 4
    assert "INVALID" not in page
    speedup = f"{summary['methods']['pld']['overall']['speedup']:.2f}x ["
    assert any("| overall | pld |" in line and speedup in line for line in page.splitlines())
    capsys.readouterr()
    for flag, file in (("--markdown", "tables.md"), ("--csv", "tables.csv")):
        assert show.main([str(out), flag]) == 0
        assert capsys.readouterr().out == (out / file).read_text()
    assert show.main([str(out / "summary.json")]) == 0
    assert "pld" in capsys.readouterr().out
    for words in ([], [str(out), "--csv", "--markdown"], [str(tmp_path)], [str(out / "tables.md")]):
        assert show.main(words) == 2
    capsys.readouterr()
    assert show.main([str(out / "samples.json")]) == 2
    assert capsys.readouterr().err.endswith("is no summary of eval.mmspec: ValueError\n")


def test_an_invalid_run_says_so_in_its_tables(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate("--limit", "3") == 0
    summary = summary_of(tmp_path / "out")
    summary["valid"] = summary["cells"][0]["valid"] = False
    assert "INVALID" in tables.page(summary)
    assert {row[tables.FACTS.index("valid")] for row in tables.tidy(summary)} == {False}


class Told:
    """What a run of W&B was told."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []

    def define_metric(self, name: str, **how: Any) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def finish(self) -> None: ...


def test_wandb_is_told_what_the_tables_say(
    evaluate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wandb = pytest.importorskip("wandb")
    told, said = Told(), {}

    def init(**how: Any) -> Told:
        said.update(how)
        return told

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert evaluate("--batch-size", "1", "2", "--wandb", "mine") == 0
    summary = summary_of(tmp_path / "out")
    assert (said["project"], said["mode"], said["job_type"]) == ("mine", "offline", "eval")
    cells, last = told.logged[:2], told.logged[2]
    for found, cell in zip(cells, summary["cells"]):
        assert found["eval/batch_size"] == cell["batch_size"]
        eagle = cell["methods"]["eagle"]
        assert found["eval/eagle/mat"] == eagle["overall"]["mat"]
        topic = next(iter(eagle["topics"]))
        assert found[f"eval/eagle/speedup/{topic}"] == eagle["topics"][topic]["speedup"]
    assert last["eval/table"].data == tables.tidy(summary)
    assert isinstance(last["eval/report"], wandb.Html)
    assert told.summary == {"valid": True, "primary": "viskip"}
    assert set(told.artifacts[0].manifest.entries) == set(wandb_log.FILES)


def test_tracking_never_fails_an_evaluation(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wandb = pytest.importorskip("wandb")

    def broken(**how: Any) -> None:
        raise OSError("no service")

    monkeypatch.setattr(wandb, "init", broken)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert evaluate("--limit", "3", "--wandb") == 0
    assert "no W&B this time (OSError: no service)" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["valid"]
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    assert evaluate("--limit", "3", "--wandb") == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_offline_run_of_wandb(
    evaluate: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert evaluate("--limit", "3", "--wandb") == 0
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
