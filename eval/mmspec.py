"""Scores heads and methods: MAT, speedup, latency and losslessness on MMSpec's records or on the synthetic splits.

    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:testmini
    python -m eval.mmspec --method all

Invariant: whatever is wrong with what the user gave is one line on stderr and exit code 2, before any model time is
spent where it can be known then. (`python eval/mmspec.py` would shadow the package of the same name: use `-m`.)
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval import report
from eval.bench import N_WARMUP, PLAIN, Bench, Result, make_methods
from eval.samples import collect
from eval.summary import DEFINITIONS, Contention, clean, hardware, number, summarise, table, unreliable, versions
from eval.tasks import MMSPEC_SYSTEM, Dialogues, data_folder, load_records
from mmspec import checkpoint as checkpoints
from mmspec import metrics
from mmspec.api import FREE, METHOD_POLICIES, STATIC, TRAINED, find_device
from mmspec.assets import EMBEDDED
from mmspec.methods import HYBRID, method_names, read_settings
from mmspec.records import Quarantine
from mmspec.sampling import KeyedSampler, make_sampler
from mmspec.targets import load_target
from mmspec.types import InputError, Target
from mmspec.verify import RejectionVerifier

PROGRAM = "eval.mmspec"
ALL = "all"
DTYPES = ("float32", "bfloat16", "float16", "float64")

EXAMPLES = """\
examples
  a quick look at a freshly trained head, 60 synthetic records:
    python -m eval.mmspec --ckpt runs/viskip_tiny
  the numbers to report (tune on synth:val, report on synth:test):
    python -m eval.mmspec --ckpt runs/viskip_tiny --data synth:test
  MMSpec's own records (a folder with mmspec.jsonl and images/), 4 at a time, 64 tokens each:
    python -m eval.mmspec --ckpt runs/viskip_tiny --data data/mmspec/testmini --batch-size 4 --max-new-tokens 64
  sampling: the text equals plain decoding's token for token at the same seed:
    python -m eval.mmspec --ckpt runs/viskip_tiny --temperature 1.0 --seed 7
  methods that need no training, on the embedded target or on any other one:
    python -m eval.mmspec --method all
    python -m eval.mmspec --method pld sam --target llava-hf/llava-1.5-7b-hf --data data/mmspec/testmini
  the same beside a head, and in front of it (hybrid), with settings of your own:
    python -m eval.mmspec --ckpt runs/viskip_tiny --method all --method-settings recipes/methods/training_free.yaml

what is compared
  plain     the target alone, one token a step, in the same loop
  <method>  each training-free method of --method: {methods}; by default with the node budget that has
            paid best so far on this machine (--method-budget fixed: all nodes, as in the papers)
  hybrid    a method that copies where its match is long, else the head with its fixed tree
  <head>    the checkpoint's head with its fixed draft tree (skipped with --policies viskip)
  viskip    the same head, steered by the checkpoint's controller, when it has one
  The figures at the top of summary.json and of the report are those of the last one in the table: of the checkpoint's
  where there is one, else of the last one after --method.
  Every method decodes the same prompts, one directly after another in alternating order. Later turns of a
  conversation see plain decoding's earlier answers, so no method is measured on prompts of its own.

what is written to --out
  summary.json      figures overall and by topic, with their definitions, the settings, versions and hardware
  requests.jsonl    one line per request and method: tokens, times, every round
  report.html       the same to look at; one file, no network
  quarantine.jsonl  records that could not be used, with the reason; only when there are any
"""


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block in front."""

    def error(self, message: str) -> NoReturn:
        # Other commands of eval/ use this parser too: the error names the one that was called.
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {message} (--help shows examples)\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(
        prog=f"python -m {PROGRAM}",
        description="Scores a draft head and training-free methods: MAT, speedup over plain decoding, latency, and "
        "whether the text is the same.",
        epilog=EXAMPLES.format(methods=", ".join(method_names())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt", metavar="DIR", help="run folder of train/distill.py; needed without --method, and for hybrid")
    add(
        "--method",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{', '.join(method_names())}, hybrid, or all (hybrid only with --ckpt)",
    )
    add(
        "--method-budget",
        choices=METHOD_POLICIES,
        default="adaptive",
        help="nodes a method drafts: what pays on this machine by measured costs, or always all it has (default: "
        "%(default)s)",
    )
    add(
        "--method-settings",
        metavar="FILE",
        help="YAML with settings of methods (default: those of recipes/methods/training_free.yaml, which has them all)",
    )
    add(
        "--data",
        default="synth:testmini",
        metavar="DATA",
        help="synth:testmini (60 records, default), synth:test (600), synth:val (200), or a folder in MMSpec's layout",
    )
    add("--out", metavar="DIR", help="where the results go (default: CKPT/eval, or runs/eval-METHODS)")
    add("--target", metavar="NAME", help=f"to decode with (default: the checkpoint's, without one {EMBEDDED})")
    add("--dtype", choices=DTYPES, default="float32", help="of target and head (default: float32)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together (default: 1)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="per request (default: 256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K best tokens; 0 is off (default)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample in the best P of probability (default: 1, off)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="logits of tokens seen before are divided (negative: multiplied) by R (default: 1, off)",
    )
    add(
        "--no-repeat-ngram",
        type=int,
        default=0,
        metavar="N",
        help="no N tokens in a row occur twice, prompt included; 0 is off (default)",
    )
    add("--seed", type=int, default=0, help="of the sampling noise and of the bootstrap (default: 0)")
    add(
        "--verifier",
        choices=("match", "rejection"),
        default="match",
        help="match gives plain decoding's text (default); rejection, for sampling only, its distribution",
    )
    add(
        "--draft-widths",
        type=int,
        nargs="+",
        metavar="N",
        help="candidates drawn at a node of each level, 1 beyond (default with --verifier rejection: 1, a chain)",
    )
    add(
        "--tree",
        type=int,
        nargs=3,
        metavar=("DEPTH", "WIDTH", "NODES"),
        help="of the head's draft (default: the checkpoint's tree.json)",
    )
    add("--share-noise", action="store_true", help="the head chooses its candidates with the sampling noise in view")
    add("--limit", type=int, metavar="N", help="only N records, taken in turn from the topics")
    add(
        "--policies",
        nargs="+",
        choices=(*FREE, *STATIC, *TRAINED),
        help="what steers the head: fixed is its tree.json, static the tree that scripts/fit_tree.py fitted or a "
        "published one by its name, viskip its controller, the others are the files of mmspec/policies (default: "
        "fixed, and viskip if the checkpoint has a controller)",
    )
    add(
        "--system",
        metavar="TEXT",
        help=f"system text (default: MMSpec's own, none for {EMBEDDED}, which never saw one)",
    )
    add(
        "--max-bad-share",
        type=float,
        default=0.05,
        metavar="S",
        help="stop when more than this share of the records is unusable (default: 0.05)",
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises InputError, naming the option, its value and what is allowed."""
    at_least = {"batch_size": 1, "max_new_tokens": 1, "limit": 1, "top_k": 0, "no_repeat_ngram": 0, "seed": 0}
    for name, least in at_least.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise InputError(f"--temperature must be 0 (greedy) or a positive number, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p must be above 0 and at most 1, got {args.top_p}")
    if not (math.isfinite(args.repetition_penalty) and args.repetition_penalty > 0):
        raise InputError(f"--repetition-penalty must be a positive number (1 is off), got {args.repetition_penalty}")
    if args.tree and (min(args.tree) < 1 or not args.ckpt):
        raise InputError(f"--tree needs --ckpt and numbers of at least 1, got {' '.join(map(str, args.tree))}")
    if args.verifier == "rejection" and args.temperature == 0:
        raise InputError("--verifier rejection needs a --temperature above 0: greedy decoding has nothing to reject")
    if args.share_noise and (args.temperature == 0 or args.verifier == "rejection"):
        raise InputError("--share-noise needs a --temperature above 0 and --verifier match")
    if args.draft_widths and (args.verifier != "rejection" or min(args.draft_widths) < 1):
        raise InputError("--draft-widths needs --verifier rejection and numbers of at least 1")
    if args.verifier == "rejection" and (chosen := sorted(set(STATIC) & set(args.policies or ()))):
        raise InputError(f"--verifier rejection needs drawn candidates; those of --policies {chosen[0]} are chosen")
    if not 0 <= args.max_bad_share <= 1:
        raise InputError(f"--max-bad-share must be between 0 and 1, got {args.max_bad_share}")
    args.device = find_device(args.device)


def choose_methods(args: argparse.Namespace) -> list[str]:
    """The training-free methods to score, and the hybrid, in the order they were asked for.

    Raises:
        InputError: an unknown name, or options that need a checkpoint or exclude these methods.
    """
    if not args.ckpt and not args.method:
        raise InputError("give --ckpt DIR, or --method all for the methods that need no training")
    known = [*method_names(), HYBRID]
    unknown = [name for name in args.method if name not in (*known, ALL)]
    if unknown:
        raise InputError(f"--method {unknown[0]} is unknown; use {', '.join(known)}, or {ALL}")
    if args.method and args.verifier == "rejection":
        raise InputError("--verifier rejection needs candidates drawn by a head; those of --method are chosen")
    if not args.ckpt:
        if HYBRID in args.method:
            raise InputError("--method hybrid needs --ckpt: its head drafts where there is nothing to copy")
        alone = [option for option in ("policies", "share_noise") if getattr(args, option)]
        if alone:
            raise InputError(f"--{alone[0].replace('_', '-')} needs --ckpt: it is about the checkpoint's head")
    if args.method_settings and not args.method:
        raise InputError("--method-settings needs --method")
    if ALL not in args.method:
        return list(dict.fromkeys(args.method))
    return known if args.ckpt else known[:-1]


def choose_policies(wanted: Sequence[str] | None, has_controller: bool) -> list[str]:
    """What steers the head. Raises InputError when viskip is asked for without a controller."""
    if wanted is None:
        return ["fixed", "viskip"] if has_controller else ["fixed"]
    if (trained := sorted(set(TRAINED) & set(wanted))) and not has_controller:
        raise InputError(f"--policies {trained[0]}: this checkpoint has no controller (viskip.safetensors); use fixed")
    return list(dict.fromkeys(wanted))


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
    checkpoint = checkpoints.load(args.ckpt) if args.ckpt else None
    if checkpoint and args.tree:
        checkpoint = replace(checkpoint, tree=checkpoints.DraftTree(*args.tree))
    policies = choose_policies(args.policies, checkpoint.viskip is not None) if checkpoint else []
    what = ALL if ALL in args.method else "-".join(named)
    usual = Path(args.ckpt) / "eval" if args.ckpt else Path("runs") / f"eval-{what}"
    out = output_folder(Path(args.out) if args.out else usual)
    quarantine = Quarantine(out / "quarantine.jsonl", fresh=True)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target(checkpoint, args.target, args.dtype, args.device)
    sampler = make_sampler(
        args.temperature, args.top_k, args.top_p, args.seed, args.repetition_penalty, args.no_repeat_ngram
    )
    rejects = args.verifier == "rejection"
    methods, how = make_methods(
        target,
        checkpoint,
        policies,
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


def open_target(checkpoint: checkpoints.Checkpoint | None, name: str | None, dtype: str, device: str) -> Target:
    """The named target, or the one the checkpoint was made for, or the embedded one.

    Raises:
        InputError: it is missing, or another one than the checkpoint's.
    """
    usual = checkpoint.target.name if checkpoint else EMBEDDED
    try:
        target: Target = load_target(name or usual, dtype, device)
    except InputError as error:
        raise InputError(str(error) if name else f"{error}; --target says where it is") from None
    if checkpoint:
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
        "checkpoint": Path(args.ckpt).name if args.ckpt else None,
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
