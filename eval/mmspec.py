"""Scores heads and methods: MAT, speedup, latency and losslessness on MMSpec's records or on the synthetic splits.

    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:testmini
    python -m eval.mmspec --method all

Invariant: whatever is wrong with what the user gave is one line on stderr and exit code 2, before any model time is
spent where it can be known then. (`python eval/mmspec.py` would shadow the package of the same name: use `-m`.)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval import report
from eval.bench import N_WARMUP, PLAIN, Bench, Result
from eval.lineup import Head, choose_heads, choose_methods, make_methods
from eval.options import ALL, PROGRAM, build_parser, check_arguments
from eval.samples import collect
from eval.summary import DEFINITIONS, Contention, clean, hardware, number, summarise, table, unreliable, versions
from eval.tasks import MMSPEC_SYSTEM, Dialogues, data_folder, load_records
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.assets import EMBEDDED
from mmspec.checkpoint import Checkpoint
from mmspec.methods import read_settings
from mmspec.records import Quarantine
from mmspec.sampling import KeyedSampler, make_sampler
from mmspec.targets import load_target
from mmspec.types import InputError, Target
from mmspec.verify import RejectionVerifier


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


class Running:
    """The progress bar: requests done, and the running MAT and speedup of the primary method."""

    def __init__(self, console: Console, total: int, primary: str) -> None:
        self.primary = primary
        self.kept = self.rounds = 0
        self.seconds = {PLAIN: 0.0, primary: 0.0}
        # Refreshed by hand between groups: a refreshing thread would run on the cores that are being timed.
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self.bar = self.progress.add_task("decoding", total=total, figures="")

    def update(self, results: Sequence[Result], total: int, n_quarantined: int) -> None:
        """Take in one finished group."""
        mine = [result for result in results if result.method == self.primary]
        for result in mine:
            self.kept += len(result.output.tokens) - 1
            self.rounds += len(result.output.rounds)
        for name in self.seconds:
            self.seconds[name] += next(result.group_s for result in results if result.method == name)
        words = f"MAT {number(ratio(self.kept, self.rounds))}"
        words += f" speedup {number(ratio(self.seconds[PLAIN], self.seconds[self.primary]))}x"
        words += f" quarantined {n_quarantined}"
        self.progress.update(self.bar, advance=len(mine), total=total, figures=words, refresh=True)


def ratio(numerator: float, denominator: float) -> float | None:
    """A ratio for the progress bar, None before there is one."""
    return numerator / denominator if denominator else None


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Score a checkpoint and methods, and write all results.

    Args:
        args: checked options.
        console: for the progress bar and the final table.

    Returns:
        What was written to `summary.json`.

    Raises:
        InputError: see the module's invariant.
    """
    named = choose_methods(args)
    given = read_settings(args.method_settings) if args.method_settings else {}
    heads = choose_heads(args.ckpt, args.tree, args.policies)
    out = output_folder(Path(args.out) if args.out else usual_folder(args, heads, named))
    quarantine = Quarantine(out / "quarantine.jsonl", fresh=True)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target([head.checkpoint for head in heads], args.target, args.dtype, args.device)
    sampler = make_sampler(
        args.temperature, args.top_k, args.top_p, args.seed, args.repetition_penalty, args.no_repeat_ngram
    )
    rejects = args.verifier == "rejection"
    methods, how = make_methods(
        target,
        heads,
        args.batch_size,
        sampler if rejects or args.share_noise else None,
        (args.draft_widths or [1]) if rejects else (),
        named,
        given,
        args.method_budget,
    )
    primary = methods[-1].name
    tie_gap = 0.0 if args.dtype == "float64" else metrics.TIE_GAP
    verifier = RejectionVerifier(sampler) if isinstance(sampler, KeyedSampler) and rejects else None
    bench = Bench(target, methods, sampler, args.batch_size, tie_gap, verifier)
    system = args.system if args.system is not None else ("" if target.name == EMBEDDED else MMSPEC_SYSTEM)
    dialogues = Dialogues(target, records, system, args.max_new_tokens, quarantine)
    for stale in ("summary.json", "report.html", "requests.jsonl"):
        (out / stale).unlink(missing_ok=True)
    contention = Contention()
    with (out / "requests.jsonl").open("w", encoding="utf-8") as rows:
        results = decode(bench, dialogues, primary, args.max_bad_share, rows, console)
    others = contention.cores()
    if not results:
        raise InputError(f"no usable record in {args.data}: all were quarantined, see {out / 'quarantine.jsonl'}")
    summary = summarise(results, [method.name for method in methods], primary, args.batch_size, args.seed)
    for method in methods:
        summary["methods"][method.name]["overall"]["seconds"] = dict(method.seconds)
    summary |= {
        "quarantined": {"count": quarantine.count, "reasons": quarantine.reasons()},
        "settings": settings(args, target, system, tie_gap, len(records), how),
        "contention": {"other_cores": others, "unreliable": unreliable(others, torch.get_num_threads())},
        "versions": versions(),
        "hardware": hardware(target.device),
        "definitions": DEFINITIONS,
    }
    write_results(out, clean(summary), collect(target, records, results, primary))
    announce(summary, out, console)
    return summary


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
    """The end of the run on the terminal: table, warnings, and where the report is."""
    console.print(table(summary))
    if summary["contention"]["unreliable"]:
        words = f"other processes used {summary['contention']['other_cores']:.1f} cores meanwhile: times are unreliable"
        console.print(words, style="red", soft_wrap=True)
    if summary["quarantined"]["count"]:
        words = f"quarantined: {summary['quarantined']['count']}, listed in {out / 'quarantine.jsonl'}"
        console.print(words, style="yellow", soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)


def decode(
    bench: Bench, dialogues: Dialogues, primary: str, max_bad_share: float, rows: TextIO, console: Console
) -> list[Result]:
    """Warm up, then decode everything, writing each group's rows as soon as it is done.

    Raises:
        InputError: more than `max_bad_share` of the records turned out unusable.
    """
    results: list[Result] = []
    n_read = len(dialogues.records) + dialogues.quarantine.count
    bench.warm_up(dialogues.warmup(max(N_WARMUP, min(bench.batch_size, 8))))
    running = Running(console, dialogues.n_turns, primary)

    def on_group(group: list[Result]) -> None:
        results.extend(group)
        for result in group:
            rows.write(json.dumps(clean(result.row()), ensure_ascii=False) + "\n")
        rows.flush()
        dialogues.quarantine.check(n_read, max_bad_share)
        running.update(group, dialogues.n_turns, dialogues.quarantine.count)

    with running.progress:
        bench.run(dialogues, on_group)
    dialogues.quarantine.check(n_read, max_bad_share)
    return results


def settings(
    args: argparse.Namespace, target: Target, system: str, tie_gap: float, n_records: int, how: dict[str, Any]
) -> dict[str, Any]:
    """Everything that could change a figure, without this machine's folder names."""
    return {
        "checkpoint": " ".join(dict.fromkeys(Path(folder).resolve().name for folder in args.ckpt)) or None,
        "data": args.data if args.data.startswith("synth:") else Path(args.data).name,
        "target": Path(target.name).name if Path(target.name).is_absolute() else target.name,
        "fingerprint": target.fingerprint,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "repetition_penalty": args.repetition_penalty,
        "no_repeat_ngram": args.no_repeat_ngram,
        "verifier": args.verifier,
        "draft_widths": args.draft_widths,
        "share_noise": args.share_noise,
        "seed": args.seed,
        "limit": args.limit,
        "n_records": n_records,
        "system": system,
        "history": "plain decoding's answers",
        "order": "alternating (ABBA)",
        "tie_gap": tie_gap,
        "methods": how,
    }


def write_results(out: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Write `summary.json` and `report.html`, each whole or not at all."""
    rows = [json.loads(line) for line in (out / "requests.jsonl").read_text(encoding="utf-8").splitlines()]
    checkpoints.write_json(out / "summary.json", summary)
    report.write(out / "report.html", summary, rows, samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        check_arguments(args)
        run(args, Console())
    except InputError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; what was decoded is in requests.jsonl", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
