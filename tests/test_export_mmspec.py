"""Exported result files against the benchmark's own schema: fields, types, and the figures that its readers compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval import export_mmspec
from tests.test_eval import rows_of
from tests.test_eval_runs import data, evaluate, run_folder  # noqa: F401

RECORD = {
    "question_id": str, "topic": str, "category": str, "answer_id": str, "model_id": str, "choices": list,
    "tstamp": float,
}  # fmt: skip
PER_TURN = {
    "turns": str, "idxs": int, "new_tokens": int, "wall_time": float, "acceptance_length": list, "draft_time": float,
    "target_time": float,
}  # fmt: skip


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The benchmark's reader, strict: every field, no other, each of its type."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert {name: type(value) for name, value in record.items()} == RECORD
        (choice,) = record["choices"]
        extra = {"decode_time"} & set(choice)
        assert set(choice) == {"index", *PER_TURN} | extra
        assert type(choice["index"]) is int
        n = len(choice["turns"])
        for name, kind in PER_TURN.items() | ({("decode_time", float)} if extra else set()):
            assert [type(value) for value in choice[name]] == [kind] * n, name
        assert all(type(a) is int for turn in choice["acceptance_length"] for a in turn)
        records.append(record)
    return records


def test_an_exported_file_is_read_by_the_benchmark_s_schema(
    evaluate: Callable[..., int],  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert evaluate("--method", "pld", "--temperature", "0", "1") == 0
    capsys.readouterr()
    assert export_mmspec.main([str(out), "--temperature", "1"]) == 0
    files = {path.stem: path for path in map(Path, capsys.readouterr().out.split())}
    assert set(files) == {"plain", "pld", "eagle", "viskip"}
    rows = [row for row in rows_of(out) if row["temperature"] == 1]
    cell = json.loads((out / "summary.json").read_text())["cells"][1]
    for method, path in files.items():
        records = read_answers(path)
        ids = [record["question_id"] for record in records]
        assert ids == sorted({row["id"] for row in rows})
        assert len({record["answer_id"] for record in records}) == len(records)
        assert {record["model_id"] for record in records} == {f"random-llava-{method}"}
        choices = [record["choices"][0] for record in records]
        assert [len(choice["turns"]) for choice in choices] == [2 if i % 3 == 2 else 1 for i in range(6)]
        assert all("decode_time" in choice for choice in choices) == (method == "plain")
        tokens = sum(sum(choice["new_tokens"]) for choice in choices)
        rounds = [turn for choice in choices for turn in choice["acceptance_length"]]
        n_rounds = sum(map(len, rounds))
        assert n_rounds == sum(idx + 1 for choice in choices for idx in choice["idxs"])
        assert (tokens - len(rounds)) / n_rounds == pytest.approx(cell["methods"][method]["overall"]["mat"])
        assert sum(map(sum, rounds)) == cell["methods"][method]["overall"]["n_accepted"]
        for choice in choices:
            for wall, draft, target in zip(choice["wall_time"], choice["draft_time"], choice["target_time"]):
                assert 0 <= draft + target <= wall
    assert export_mmspec.main([str(out), "--batch-size", "7"]) == 2
    assert "there are: 1 and 0, 1 and 1" in capsys.readouterr().err
    assert export_mmspec.main([str(tmp_path / "nothing")]) == 2
    assert "holds no results of eval.mmspec" in capsys.readouterr().err
