"""The commands that wait for real weights, tried on small copies of the same layouts: verdicts, refusals, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from scripts import on_mmspec
from tests import test_convert as layouts
from tests.test_eval import records_in, write_records
from tests.training import record, save_data, save_recipe, save_target

SOURCES = {"s": {"name": "somebody", "what": "", "how": ""}}


def figure(mat: Any) -> dict[str, Any]:
    return {"head": "eagle", "target": "t", "data": "MMSpec's test", "mat": mat, "source": "s"}


@pytest.mark.parametrize(
    ("measured", "mat", "passed", "off"),
    [
        (3.98, 3.98, True, 0.0),
        (3.79, 3.98, True, -0.0477),
        (3.77, 3.98, False, -0.0528),
        (4.20, 3.98, False, 0.0553),
        (3.4, [3.1, 3.8], True, 0.0),
        (3.0, [3.1, 3.8], True, -0.0323),
        (4.1, [3.1, 3.8], False, 0.0789),
        (None, 3.98, False, None),
    ],
)
def test_passed_is_within_five_percent_of_a_figure_or_of_a_range(measured: Any, mat: Any, passed: bool, off: Any):
    verdict = on_mmspec.judge("x", measured, figure(mat), SOURCES)
    assert verdict.passed == passed
    assert verdict.off == (None if off is None else pytest.approx(off, abs=1e-3))


def test_a_head_that_changes_answers_does_not_pass():
    verdict = on_mmspec.judge("x", 3.98, figure(3.98), SOURCES, valid=False)
    assert verdict.off == 0
    assert not verdict.passed
    assert verdict.said.startswith("INVALID: answers differ")


def test_the_gate_of_a_score_counts_and_a_score_that_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done = []

    def pretend(step: Any, ledger: Any) -> None:
        done.append(step)
        if step.makes.suffix == ".json":
            step.makes.parent.mkdir(parents=True, exist_ok=True)
            step.makes.write_text(json.dumps({"mat": 3.98, "valid": False}))

    monkeypatch.setattr(on_mmspec, "perform", pretend)
    write_records(tmp_path, [])
    head = {"name": "eagle", "target": "t", "layout": "eagle", "hub": str(tmp_path), "tree": [4, 3, 9]}
    known = {"sources": SOURCES, "targets": {"t": "x"}, "heads": [head], "figures": [figure(3.98)]}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(known))
    words = ["--data", str(tmp_path), "--device", "cpu"]
    public = ["--published", str(tmp_path / "list.yaml"), "--out", str(tmp_path / "out")]
    assert on_mmspec.main(["heads", *words, *public]) == 1
    [found] = json.loads((tmp_path / "out" / "verdict.json").read_text())["heads"]
    assert (found["off"], found["valid"], found["passed"]) == (0, False, False)
    made = str(on_mmspec.ROOT / "recipes" / "eagle_tiny.yaml")
    assert on_mmspec.main(["recipe", made, f"run.out={tmp_path / 'runs'}", *words]) == 0
    assert [step.resume for step in done if step.name.startswith("score")] == [("--resume",)] * 2


def test_without_a_figure_nothing_passes():
    assert not on_mmspec.judge("x", 4.0, None, SOURCES).passed


def test_published_figures_have_sources_targets_and_settings():
    known = yaml.safe_load(on_mmspec.PUBLISHED.read_text())
    for entry in known["figures"]:
        assert entry["source"] in known["sources"]
        assert entry["target"] in known["targets"]
    for head in known["heads"]:
        depth, width, nodes = head["tree"]
        assert nodes <= width + (depth - 1) * width**2
        mine = [f for f in known["figures"] if f["head"] == head["layout"] and f["target"] == head["target"]]
        assert any(f["data"].startswith(on_mmspec.BENCHMARK) for f in mine), head["name"]


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_records(tmp_path, [])
    (tmp_path / "list.yaml").write_text("a: 1")
    for words, said in (
        (["heads", "--data", str(tmp_path / "no")], "mmspec.jsonl"),
        (["heads", "--data", str(tmp_path), "--published", str(tmp_path / "list.yaml")], "figures"),
        (["heads", "--data", str(tmp_path), "--only", "nobody"], "nobody"),
        (["recipe", "none.yaml", "--data", str(tmp_path)], "none.yaml"),
    ):
        assert on_mmspec.main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.slow
def test_heads_are_converted_scored_and_judged_and_a_second_call_only_reads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Untrained heads of three layouts, whose MAT is near 1: one figure fits, one does not, one head is a pickle."""
    torch.manual_seed(1)
    save_target(tmp_path / "target")
    data = tmp_path / "data"
    write_records(data, records_in(data, 6))
    tensors = {"eagle": layouts.eagle(), "msd": layouts.eagle(input_layernorm=""), "vispec": layouts.vispec()}
    for name, held in tensors.items():
        held.pop("embed_tokens.weight")  # of a target in fp64
        layouts.publish(tmp_path / "hub" / name, {key: value.float() for key, value in held.items()}, layouts.CONFIG)
    (tmp_path / "hub" / "vispec" / "model.safetensors").rename(tmp_path / "hub" / "vispec" / "pytorch_model.bin")
    known = {
        "sources": SOURCES,
        "targets": {"t": str(tmp_path / "target")},
        "heads": [
            {"name": name, "target": "t", "layout": name, "hub": str(tmp_path / "hub" / name), "tree": [4, 3, 9]}
            for name in tensors
        ],
        "figures": [figure([1.0, 1.2]), {**figure(3.98), "head": "msd"}],
    }
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(known))
    words = ["heads", "--data", str(data), "--published", str(tmp_path / "list.yaml"), "--out", str(tmp_path / "out")]
    words += ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "12"]
    assert on_mmspec.main(words) == 1
    found = {entry["name"]: entry for entry in json.loads((tmp_path / "out" / "verdict.json").read_text())["heads"]}
    assert [found[name]["passed"] for name in tensors] == [True, False, False]
    assert found["msd"]["off"] < -0.5
    assert found["vispec"]["measured"] is None
    first = capfd.readouterr()
    assert "a pickle" in first.err
    assert on_mmspec.main([*words, "--only", "eagle"]) == 0
    again = capfd.readouterr()
    assert again.out.count("done already") == 2
    assert "passed" in again.out


@pytest.mark.slow
def test_a_recipe_is_trained_and_scored_beside_every_method(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    save_target(tmp_path / "target")
    data = tmp_path / "data"
    write_records(data, records_in(data, 4))
    train = save_data(tmp_path / "train", [record(number) for number in range(8)])
    made = save_recipe(tmp_path / "r.yaml", tmp_path / "target", train, tmp_path / "runs")
    words = ["recipe", str(made), "run.trackers=[]", "--data", str(data), "--procs", "1", "--max-new-tokens", "6"]
    assert on_mmspec.main(words) == 0
    summary = json.loads((tmp_path / "runs" / "t" / "mmspec" / "summary.json").read_text())
    assert {"eagle", "pld", "sam"} <= set(summary["methods"])
    capfd.readouterr()
    assert on_mmspec.main(words) == 0
    assert capfd.readouterr().out.count("done already") == 2
    # Without the notes of what was done, a finished head is still taken as it is.
    (tmp_path / "runs" / "t" / "on_mmspec" / "steps.json").unlink()
    head = (tmp_path / "runs" / "t" / "head.safetensors").read_bytes()
    assert on_mmspec.main(words) == 0
    assert "is finished" in capfd.readouterr().out
    assert (tmp_path / "runs" / "t" / "head.safetensors").read_bytes() == head
