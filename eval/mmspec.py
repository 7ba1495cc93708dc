"""Scores heads and methods: MAT, speedup, latency and losslessness on MMSpec's records or on the synthetic splits.

    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:testmini
    python -m eval.mmspec --method all

Invariant: whatever is wrong with what the user gave is one line on stderr and exit code 2, before any model time is
spent where it can be known then. (`python eval/mmspec.py` would shadow the package of the same name: use `-m`.)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from eval import report, tables, wandb_log
from eval.bench import Result
from eval.cells import Decoded, Work, cells, decode
from eval.lineup import (
    Head,
    check_frozen,
    check_hybrids,
    choose_heads,
    choose_methods,
    file_hash,
    kind_of,
    named_files,
)
from eval.options import ALL, PROGRAM, build_parser, check_arguments
from eval.ranks import Ranks, join, leave, own_device
from eval.references import References, load_references
from eval.rows import Cell, Rows, alone, from_row, merge
from eval.samples import collect
from eval.summary import (
    DEFINITIONS,
    OF_THE_RUN,
    busiest,
    clean,
    hardware,
    show,
    summarise,
    unreliable,
    versions,
)
from eval.tasks import PLAIN, data_folder, data_name, limit_pixels, load_records, system_text
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import STATIC_TREE
from mmspec.arguments import command
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import Checkpoint
from mmspec.methods import read_settings, resolved
from mmspec.records import Quarantine, Record
from mmspec.targets import load_target
from mmspec.types import InputError, Target

REQUESTS, RUN, METHOD_COSTS = "requests.jsonl", "run.json", "method_costs"
DECIDING = ("head.safetensors", "viskip.safetensors", STATIC_TREE)
"""Files of a run folder that rounds depend on."""


def output_folder(path: Path) -> Path:
    """Make the folder. Raises InputError when it cannot be made or written to."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}") from None
    return path


def run(args: argparse.Namespace, console: Console, ranks: Ranks) -> dict[str, Any]:
    """Score checkpoints and methods, and write all results.

    Args:
        args: checked options.
        console: for the progress bar and the final table.
        ranks: this process among those that share the records.

    Returns:
        What was written to `summary.json`; {} on any process but the first.

    Raises:
        InputError: see the module's invariant.
    """
    named = choose_methods(args)
    given = read_settings(args.method_settings) if args.method_settings else {}
    heads = choose_heads(args.ckpt, args.tree, args.policies, args.target, args.dtype)
    check_hybrids(named, heads)
    check_frozen(args, named, given)
    out = ranks.in_turn(lambda: output_folder(Path(args.out) if args.out else usual_folder(args, heads, named)))
    with contextlib.ExitStack() as held:
        ranks.in_turn(lambda: held.enter_context(alone(out)) if ranks.first else None)
        return _score(args, console, ranks, out, named, given, heads)


def _score(
    args: argparse.Namespace,
    console: Console,
    ranks: Ranks,
    out: Path,
    named: Sequence[str],
    given: Mapping[str, Mapping[str, Any]],
    heads: Sequence[Head],
) -> dict[str, Any]:
    """`run` in its folder."""
    listed = out / "quarantine.jsonl"
    quarantine = Quarantine(listed if ranks.first else None, fresh=True)
    folder = ranks.in_turn(lambda: data_folder(args.data))
    records = ranks.agree(lambda: load_records(folder, args.limit, quarantine, args.max_bad_share))
    references = ranks.agree(lambda: load_references(folder))
    n_read = quarantine.n_read
    device = own_device(args.device, ranks)
    target = ranks.agree(lambda: open_target([head.checkpoint for head in heads], args.target, args.dtype, device))
    pixels = ranks.agree(lambda: limit_pixels(target, args.pixels))
    system = system_text(target, args.system)
    said = settings(args, target, system, len(records), pixels)
    run_id, facts = identify(
        said,
        target,
        heads,
        {name: resolved(kind_of(name), given.get(kind_of(name))) for name in named if name != PLAIN},
        records,
        ranks,
    )
    ranks.in_turn(lambda: begin(out, facts, args.resume) if ranks.first else None)
    own = out / (f"requests.{ranks.rank}.jsonl" if ranks.size > 1 else REQUESTS)
    rows = ranks.agree(lambda: Rows(own, [out / REQUESTS] if ranks.size > 1 else [], run_id, args.resume))
    if not ranks.first:
        quarantine = Quarantine(listed)
    sitting = {"sitting": ranks.gather(time.time())[0]}
    work = Work(
        args, ranks, target, heads, named, given, ranks.mine(records), n_read, system, quarantine, rows,
        row_facts(run_id, target, args) | sitting, out / METHOD_COSTS, console,
    )  # fmt: skip
    decoded = [ranks.agree(partial(decode, work, cell)) for cell in cells(args)]
    reasons = sum(map(Counter, ranks.gather(quarantine.reasons())), Counter[str]())
    check_all(reasons, n_read, args.max_bad_share, listed)
    if not ranks.first:
        return {}
    lines = gather_rows(out, ranks, decoded, records)
    results = {cell: [from_row(row) for row in some] for cell, some in lines.items()}
    if not any(results.values()):
        raise InputError(f"no usable record in {args.data}: all were quarantined, see {listed}")
    swept = [
        cell_summary(one, results[one.cell], args, ranks, references, busiest(lines[one.cell], ranks.size))
        for one in decoded
    ]
    first = {key: value for key, value in swept[0].items() if key not in ("batch_size", "temperature")}
    whole = {
        **first,
        "run_id": run_id,
        "valid": all(cell["valid"] for cell in swept),
        "quarantined": {"count": reasons.total(), "reasons": dict(reasons.most_common())},
        "settings": said | {"tie_gap": metrics.TIE_GAPS[args.dtype], "methods": decoded[0].how},
        "versions": versions(),
        "hardware": hardware(target.device),
        "definitions": DEFINITIONS | OF_THE_RUN,
        "cells": swept,
    }
    shown = results[decoded[0].cell]
    write_results(out, clean(whole), clean(collect(target, records, shown, whole["primary"])))
    announce(whole, out, console)
    if args.wandb is not None:
        console.print(wandb_log.log(out, clean(whole), args.wandb or None), soft_wrap=True, highlight=False)
    return whole


def cell_summary(
    one: Decoded,
    results: Sequence[Result],
    args: argparse.Namespace,
    ranks: Ranks,
    references: References | None,
    others: float | None,
) -> dict[str, Any]:
    """The entry of a cell under `cells`; `others` are the cores that other processes kept busy, see `busiest`."""
    batch, temperature = one.cell
    summary = summarise(results, one.names, one.names[-1], batch, args.seed, references)
    contention = {"other_cores": others, "unreliable": unreliable(others, torch.get_num_threads() * ranks.size)}
    return {"batch_size": batch, "temperature": temperature, **summary, "contention": contention}


def check_all(reasons: Counter[str], n_read: int, max_bad_share: float, listed: Path) -> None:
    """The check of `decode` once more, for all processes together: each has compared its own bad records with all.

    Args:
        reasons: why records are unusable, and how often.
        n_read, max_bad_share: see `Quarantine.check`.
        listed: where they are.

    Raises:
        InputError: see `Quarantine.check`.
    """
    whole = Quarantine(None)  # counts them; they are listed already
    for reason in reasons.elements():
        whole.add("", 0, "", reason)
    whole.path = listed
    whole.check(n_read, max_bad_share)


def begin(out: Path, facts: Mapping[str, Any], resume: bool) -> None:
    """Makes the folder ready: for a new run what an earlier one left goes, for one that goes on it must be the same.

    Raises:
        InputError: `--resume`, and what is there was made with other settings.
    """
    path = out / RUN
    if resume and path.is_file():
        before, now = (_flat(value) for value in (json.loads(path.read_text(encoding="utf-8")), facts))
        for key in dict.fromkeys((*now, *before)):
            if before.get(key) != now.get(key) and key != "run_id":
                raise InputError(
                    f"--resume: {out} was begun with another {key} ({_short(before.get(key))}, now "
                    f"{_short(now.get(key))}); leave out --resume to start anew, or give another --out"
                )
        return
    for stale in (*(out / name for name in wandb_log.FILES), path, *out.glob("requests*.jsonl")):
        stale.unlink(missing_ok=True)
    shutil.rmtree(out / METHOD_COSTS, ignore_errors=True)
    checkpoints.write_json(path, facts)


def _flat(value: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Entries of nested mappings by their dotted names, as JSON has them."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{within}{key}"
        found |= _flat(item, f"{name}.") if isinstance(item, Mapping) else {name: json.loads(json.dumps(item))}
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def gather_rows(
    out: Path, ranks: Ranks, decoded: Sequence[Decoded], records: Sequence[Record]
) -> dict[Cell, list[dict[str, Any]]]:
    """Everyone's lines in one file, in the order of cells, records, turns and methods; and the same by cell."""
    paths = [out / REQUESTS]
    if ranks.size > 1:
        paths += [out / f"requests.{rank}.jsonl" for rank in range(ranks.size)]
    place = {record.id: number for number, record in enumerate(records)}
    order = {one.cell: number for number, one in enumerate(decoded)}
    names = {name: number for number, name in enumerate(decoded[0].names)}

    def key(row: Mapping[str, Any]) -> tuple[int, int, int, int]:
        return order[row["batch"], row["temperature"]], place[row["id"]], row["turn"], names[row["method"]]

    found: dict[Cell, list[dict[str, Any]]] = {one.cell: [] for one in decoded}
    for row in merge(paths, out / REQUESTS, key):
        found[row["batch"], row["temperature"]].append(row)
    return found


def identify(
    said: Mapping[str, Any], target: Target, heads: Sequence[Head], methods: Mapping[str, Any],
    records: Sequence[Record], ranks: Ranks,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    """What makes a run this run: its id, and all that a run which goes on must have in common with it."""
    asked = hashlib.sha256(json.dumps([(record.id, record.topic, record.turns) for record in records]).encode())
    facts = {
        "settings": dict(said),
        "heads": {
            head.name: {
                "files": {
                    path.name: file_hash(path)
                    for path in (head.checkpoint.folder / name for name in DECIDING)
                    if path.is_file()
                },
                "tree": asdict(head.checkpoint.tree),
                "policies": list(head.policies),
            }
            for head in heads
        },
        "methods": dict(methods),
        "files": {name: named_files(how) for name, how in methods.items()},
        "records": asked.hexdigest()[:16],
        "processes": ranks.size,
        "hardware": hardware(target.device),
        "versions": versions(),
        "git": checkpoints.git_commit(),
    }
    run_id = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    return run_id, {"run_id": run_id, **facts}


def row_facts(run_id: str, target: Target, args: argparse.Namespace) -> dict[str, Any]:
    """What every line says of the run."""
    machine = hardware(target.device)
    return {
        "run_id": run_id,
        "git": checkpoints.git_commit(),
        "hw": machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads",
        "sw": ", ".join(f"{name} {number}" for name, number in versions().items() if number),
        "target": placeless(target.name),
        "dtype": args.dtype,
        "attn": "sdpa",
        "seed": args.seed,
    }


def usual_folder(args: argparse.Namespace, heads: Sequence[Head], named: Sequence[str]) -> Path:
    """Where results go that were given no place."""
    if len(heads) == 1:
        return heads[0].checkpoint.folder / "eval"
    what = [head.name for head in heads] or ([ALL] if ALL in args.method else list(named))
    return Path("runs") / f"eval-{'-'.join(what)}"


def open_target(loaded: Sequence[Checkpoint], name: str | None, dtype: str, device: str) -> Target:
    """The named target, or the one the checkpoints were made for, or the embedded one.

    Raises:
        InputError: it is missing, or another one than a checkpoint's.
    """
    usual = loaded[0].target.name if loaded else EMBEDDED
    try:
        target: Target = load_target(name or usual, dtype, device)
    except InputError as error:
        raise InputError(str(error) if name else f"{error}; --target says where it is") from None
    for checkpoint in loaded:
        checkpoint.check_target(target)
    return target


def announce(summary: dict[str, Any], out: Path, console: Console) -> None:
    """The end of the run on the terminal: tables, warnings, and where the report is."""
    show(summary, console)
    if not summary["valid"]:
        words = "INVALID: answers differ from plain decoding's, and not at a tie; see divergences in summary.json"
        console.print(words, style="bold red", soft_wrap=True)
    if busy := [cell["contention"]["other_cores"] for cell in summary["cells"] if cell["contention"]["unreliable"]]:
        words = f"other processes used {max(busy):.1f} cores meanwhile: times are unreliable"
        console.print(words, style="red", soft_wrap=True)
    if summary["quarantined"]["count"]:
        words = f"quarantined: {summary['quarantined']['count']}, listed in {out / 'quarantine.jsonl'}"
        console.print(words, style="yellow", soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)


def settings(
    args: argparse.Namespace, target: Target, system: str, n_records: int, pixels: tuple[int, int] | None
) -> dict[str, Any]:
    """Everything that could change a figure, without this machine's folder names."""
    return {
        "checkpoint": " ".join(dict.fromkeys(Path(folder).resolve().name for folder in args.ckpt)) or None,
        "data": data_name(args.data),
        "target": placeless(target.name),
        "fingerprint": target.fingerprint,
        "dtype": args.dtype,
        "batch_size": args.batch_size[0],
        "batch_sizes": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature[0],
        "temperatures": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "no_repeat_ngram": args.no_repeat_ngram,
        "verifier": args.verifier,
        "draft_widths": args.draft_widths,
        "share_noise": args.share_noise,
        "method_budget": args.method_budget,
        "frozen": args.frozen,
        "seed": args.seed,
        "limit": args.limit,
        "n_records": n_records,
        "system": system,
        "pixels": None if pixels is None else list(pixels),
        "history": "plain decoding's answers" if args.history == "fixed" else "each method's own answers",
        "order": "alternating (ABBA)",
    }


def placeless(name: str) -> str:
    """A target's name without this machine's folder names."""
    return Path(name).name if Path(name).is_absolute() else name


def write_results(out: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Write `summary.json`, `samples.json`, `report.html` and the tables, each whole or not at all."""
    checkpoints.write_json(out / "summary.json", summary)
    tables.write(out, summary)
    report.write(out / "report.html", summary, samples)


@command(PROGRAM, interrupted="the same command with --resume goes on")
def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = build_parser().parse_args(argv)
    ranks = join()
    try:
        check_arguments(args)
        run(args, Console(quiet=not ranks.first), ranks)
    except InputError:
        if ranks.first:
            raise
        return 2
    finally:
        leave(ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
