"""Runs of several cells and several sittings: sweeps, interruptions, processes that share, and conversations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import mmspec as cli
from eval.ranks import Ranks
from eval.rows import ROUND, SCHEMA, alone
from eval.summary import Contention
from mmspec.checkpoint import DraftTree
from tests import tiny
from tests.test_eval import records_in, rows_of, write_records
from train.world import free_port

Key = tuple[int, float, str, int, str]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run_folder(tmp_path_factory.mktemp("runs") / "random", tiny.llava(), DraftTree(4, 3, 6))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_records(folder, records_in(folder, 6))


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, run_folder: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the command in this process on a random target in fp64."""
    monkeypatch.setattr(cli, "load_target", lambda name, dtype, device: tiny.llava(dtype=dtype))

    def call(*words: str, out: str = "out") -> int:
        given = ["--ckpt", str(run_folder), "--data", str(data), "--dtype", "float64", "--max-new-tokens", "8"]
        given += ["--method-budget", "fixed"]  # no costs to measure in every run
        return cli.main([*given, "--out", str(tmp_path / out), *words])

    return call


def said(out: Path, rounds: bool = False) -> dict[Key, Any]:
    """What was answered, by cell, request and method; with the shape of each round where asked."""
    rows = rows_of(out)
    found = {
        (row["batch"], row["temperature"], row["id"], row["turn"], row["method"]): (
            row["output_ids"],
            row["finish_reason"],
            [entry[:5] for entry in row["rounds"]] if rounds else None,
        )
        for row in rows
    }
    assert len(found) == len(rows), "no answer is there twice"
    return found


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_a_sweep_is_its_cells_and_the_first_of_them_is_the_run(evaluate: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate("--batch-size", "1", "3", "1", "--temperature", "0", "1", "--method", "pld") == 0
    whole, rows = summary_of(out), said(out)
    cells = [(cell["batch_size"], cell["temperature"]) for cell in whole["cells"]]
    assert cells == [(1, 0.0), (1, 1.0), (3, 0.0), (3, 1.0)]
    for key in ("primary", "methods", "mat", "speedup", "exact_match", "claims", "contention"):
        assert whole[key] == whole["cells"][0][key]
    assert (whole["settings"]["batch_size"], whole["settings"]["temperature"]) == (1, 0.0)
    for cell in whole["cells"]:
        assert list(cell["methods"]) == ["plain", "pld", "eagle", "viskip"]
        assert all(method["overall"]["exact_match"] == 1.0 for method in cell["methods"].values())
    assert whole["valid"]
    text = {cell: {key[2:]: value for key, value in rows.items() if key[:2] == cell} for cell in cells}
    assert text[1, 0.0] == text[3, 0.0]
    assert text[1, 1.0] == text[3, 1.0]
    assert text[1, 0.0] != text[1, 1.0]
    # A cell is what a run of its own is.
    assert evaluate("--batch-size", "3", "--temperature", "1", "--method", "pld", out="lone") == 0
    assert {key[2:]: value for key, value in said(tmp_path / "lone").items()} == text[3, 1.0]


def test_every_line_says_what_it_was_measured_with(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate("--method", "pld", "--limit", "3", "--batch-size", "2") == 0
    rows = rows_of(tmp_path / "out")
    assert len({row["run_id"] for row in rows}) == 1
    for row in rows:
        assert row["schema"] == SCHEMA
        assert set(row) >= {"git", "hw", "sw", "target", "drafter", "drafter_hash", "params", "dtype", "attn", "seed"}
        assert row["total_s"] == pytest.approx(row["ttft_s"] + row["decode_s"])
        assert all(len(entry) == len(ROUND) for entry in row["rounds"])
        assert sum(entry[4] for entry in row["rounds"]) == len(row["output_ids"]) - 1
        assert all((entry[2] > 0) == (entry[0] == "draft") for entry in row["rounds"])
        assert all(entry[6] > 0 for entry in row["rounds"]), "a round takes a verification"
        assert "/" not in row["image"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["eagle"]["drafter_hash"] == by_method["viskip"]["drafter_hash"] is not None
    assert by_method["eagle"]["params"] > by_method["pld"]["params"] == 0
    assert by_method["plain"]["drafter"] == "none"


@pytest.mark.parametrize("batch", [pytest.param("1", marks=pytest.mark.slow), "2"])
def test_an_interrupted_run_goes_on_to_the_same_answers_and_frozen_to_the_same_rounds(
    evaluate: Callable[..., int], tmp_path: Path, batch: str
) -> None:
    words = ("--method", "pld", "--frozen", "--batch-size", batch, "--temperature", "1")
    out = tmp_path / "out"
    assert evaluate(*words) == 0
    unbroken, rows, times = said(out, rounds=True), rows_of(out), {}
    whole = (out / "requests.jsonl").read_bytes()
    for share in (0.0, 0.13, 0.71, 0.99):
        (out / "requests.jsonl").write_bytes(whole[: int(len(whole) * share)])
        (out / "summary.json").unlink()
        assert evaluate(*words, "--resume") == 0
        assert said(out, rounds=True) == unbroken
        assert summary_of(out)["mat"] is not None
        after = {(row["id"], row["turn"], row["method"]): row["total_s"] for row in rows_of(out)}
        times[share] = sum(after[row["id"], row["turn"], row["method"]] == row["total_s"] for row in rows)
    assert times[0.0] == 0, "nothing was kept, all was decoded again"
    assert len(rows) / 2 < times[0.99] < len(rows), "what was there was kept"
    finished = (out / "requests.jsonl").read_bytes()
    assert evaluate(*words, "--resume") == 0
    assert (out / "requests.jsonl").read_bytes() == finished, "a finished run is only summarised again"


def test_a_run_goes_on_only_as_what_it_was(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--resume", "--limit", "3") == 0, "there is nothing yet: it begins"
    before = said(tmp_path / "out")
    assert evaluate("--resume", "--limit", "3", "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "was begun with another run_id" not in error
    assert "was begun with another settings.seed (0, now 1)" in error
    assert error.count("\n") == 1
    assert evaluate("--resume", "--limit", "3", "--tree", "1", "1", "1") == 2
    assert "another heads" in capsys.readouterr().err
    assert said(tmp_path / "out") == before
    assert evaluate("--limit", "2") == 0, "without --resume it starts anew"
    assert len(said(tmp_path / "out")) == 6


def test_a_run_goes_on_only_with_the_files_that_its_settings_name(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree, settings = tmp_path / "tree.json", tmp_path / "settings.yaml"
    tree.write_text('{"paths": [[0], [1], [0, 0]]}')
    settings.write_text(f"recycling: {{tree: {tree}}}\n")
    words = ["--method", "recycling", "--method-settings", str(settings), "--method-budget", "fixed"]
    words += ["--policies", "fixed", "--limit", "3"]
    assert evaluate(*words) == 0
    assert summary_of(tmp_path / "out")["settings"]["methods"]["recycling"]["tree"] == "tree.json"
    assert evaluate(*words, "--resume") == 0
    tree.write_text('{"paths": [[0], [0, 0]]}')
    assert evaluate(*words, "--resume") == 2
    assert "was begun with another files.recycling.tree" in capsys.readouterr().err


def test_a_run_goes_on_only_by_the_costs_that_it_was_begun_with(
    evaluate: Callable[..., int], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another command may measure them again, as for a larger batch; a cell that is whole has no use for them."""
    requests = tmp_path / "out" / "requests.jsonl"
    assert evaluate("--frozen") == 0
    unbroken, whole = said(tmp_path / "out", rounds=True), requests.read_bytes()
    [table] = (run_folder / "costs").glob("*.json")
    before = table.read_text()
    other = json.loads(before)
    other["verify_s"]["1"]["1"] *= 2
    try:
        table.write_text(json.dumps(other))
        assert evaluate("--frozen", "--resume") == 0
        requests.write_bytes(whole[: len(whole) // 2])
        assert evaluate("--frozen", "--resume") == 2
        error = capsys.readouterr().err
        assert "requests.jsonl was begun with other costs of viskip" in error
        assert error.count("\n") == 1
    finally:
        table.write_text(before)
    assert evaluate("--frozen", "--resume") == 0
    assert said(tmp_path / "out", rounds=True) == unbroken


def test_a_sitting_that_other_work_slowed_is_not_forgotten(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one count that decoded nothing."""
    requests = tmp_path / "out" / "requests.jsonl"
    found = []
    for others, share in ((8.0, 0.5), (0.5, 1.0), (99.0, 1.0)):
        monkeypatch.setattr(Contention, "busy", lambda self, others=others: (1.0 + others, 1.0))
        assert evaluate("--policies", "fixed", "--resume") == 0
        found.append(summary_of(tmp_path / "out")["contention"]["other_cores"])
        whole = requests.read_bytes()
        requests.write_bytes(whole[: int(len(whole) * share)])
    assert found == [8.0, 8.0, 8.0]


class Twice(Ranks):
    """One process that hears of what it quarantined twice, as from a peer that found as much."""

    def gather(self, value: Any) -> list[Any]:
        return [value] * (2 if isinstance(value, dict) else 1)


def test_processes_are_held_together_to_the_share_of_bad_records(
    evaluate: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of six is too long for the target, of which each process finds as many: a third in all."""
    folder = tmp_path / "long"
    records = records_in(folder, 6)
    records[0]["turns"] = ["w1 " * 400]
    words = ("--data", str(write_records(folder, records)), "--policies", "fixed", "--max-bad-share", "0.2")
    assert evaluate(*words) == 0
    monkeypatch.setattr(cli, "join", Twice)
    assert evaluate(*words) == 2
    error = capsys.readouterr().err
    assert "error: 2 of 6 records are unusable (33.3%, allowed 20.0%), most often (2x): prompt longer" in error
    assert error.strip().endswith("quarantine.jsonl")


def test_two_runs_do_not_write_to_one_folder(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"):
        assert evaluate() == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"eval.mmspec: error: another run is writing to {tmp_path / 'out'}: ")
    assert not (tmp_path / "out" / "requests.jsonl").exists()
    assert evaluate("--method", "plain") == 0


def test_plain_decoding_beside_itself_is_the_same_work(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate("--method", "plain", "--policies", "fixed", "--limit", "3") == 0
    methods = summary_of(tmp_path / "out")["methods"]
    assert list(methods) == ["plain", "plain_again", "eagle"]
    again = methods["plain_again"]["overall"]
    assert (again["mat"], again["exact_match"], again["skip_rate"]) == (1.0, 1.0, 1.0)


def test_own_histories_are_plain_decoding_s_where_nothing_differs(evaluate: Callable[..., int], tmp_path: Path) -> None:
    assert evaluate("--history", "self") == 0
    own = said(tmp_path / "out")
    assert summary_of(tmp_path / "out")["settings"]["history"] == "each method's own answers"
    assert evaluate("--history", "fixed") == 0
    assert said(tmp_path / "out") == own


def test_the_device_counters_are_null_where_there_are_none_and_read_where_there_are(tmp_path: Path) -> None:
    from eval.meters import Meter

    meter = Meter(torch.device("cpu"), tmp_path)
    meter.start()
    assert meter.stop() == (None, None)
    for package, joules in ((0, 1.5), (1, 2.0)):
        (tmp_path / f"intel-rapl:{package}").mkdir()
        (tmp_path / f"intel-rapl:{package}" / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    meter = Meter(torch.device("cpu"), tmp_path)
    meter.start()
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2250000\n")
    assert meter.stop() == (0.25, None)
    meter.start()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("7\n")
    assert meter.stop() == (None, None), "the counter began anew"


SHARING = """
from eval.ranks import join, leave
from mmspec.types import InputError
ranks = join()
order = ranks.in_turn(lambda: (print(f"turn of {ranks.rank}", flush=True), ranks.rank)[1])
assert order == ranks.rank
assert ranks.gather({"rank": ranks.rank}) == [{"rank": 0}, {"rank": 1}]
def work():
    if ranks.rank == 1:
        raise InputError("one of us failed")
try:
    ranks.agree(work)
except InputError as error:
    print(f"{ranks.rank}: {error}", flush=True)
leave(ranks)
"""


def test_two_processes_take_turns_and_an_error_of_one_is_everyone_s() -> None:
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING], env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said == [[f"turn of {rank}", f"{rank}: one of us failed"] for rank in range(2)]


def _stored_target(folder: Path) -> Path:
    target = tiny.llava()
    target.model.save_pretrained(folder)
    target.processor.save_pretrained(folder)
    return folder


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]


@pytest.mark.slow
def test_a_run_killed_five_times_and_two_processes_give_what_one_unbroken_run_gives(
    run_folder: Path, data: Path, tmp_path: Path
) -> None:
    target = _stored_target(tmp_path / "target")
    words = ["--ckpt", str(run_folder), "--target", str(target), "--data", str(data), "--dtype", "float64"]
    words += ["--max-new-tokens", "24", "--method", "pld", "--frozen", "--device", "cpu"]

    def run(command: list[str], out: str, *more: str) -> subprocess.Popen[bytes]:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [*command, *words, "--out", str(tmp_path / out), *more], env=env, stdout=subprocess.DEVNULL
        )

    assert run(_command("eval.mmspec"), "one").wait(timeout=120) == 0
    launcher = _command("torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "eval.mmspec")
    assert run(launcher, "two", "--batch-size", "1").wait(timeout=240) == 0
    assert said(tmp_path / "two") == said(tmp_path / "one")
    assert sorted(path.name for path in (tmp_path / "two").glob("*.jsonl")) == ["requests.jsonl"]
    one, two = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    for name, method in one["methods"].items():
        assert method["overall"]["exact_match"] == two["methods"][name]["overall"]["exact_match"] == 1.0
        assert method["overall"]["n_requests"] == two["methods"][name]["overall"]["n_requests"] == 8
    lines, kills = 0, 0
    partial = tmp_path / "killed" / "requests.jsonl"
    while kills < 5:
        process = run(_command("eval.mmspec"), "killed", "--resume")
        while process.poll() is None:
            now = partial.read_bytes().count(b"\n") if partial.is_file() else 0
            if now > lines:
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.002)
        assert process.returncode == -signal.SIGKILL, "it was over before it was killed five times"
        lines = partial.read_bytes().count(b"\n")
        kills += 1
    assert run(_command("eval.mmspec"), "killed", "--resume").wait(timeout=120) == 0
    costs = [json.loads(path.read_text()) for path in (tmp_path / "killed" / "method_costs").rglob("*.json")]
    assert len(costs) == 1
    assert said(tmp_path / "killed") == said(tmp_path / "one")
