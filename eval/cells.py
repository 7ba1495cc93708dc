"""One cell of a sweep: a batch size and a temperature, at which everyone decodes every record.

Invariant: cells share the target, the records and nothing else: each has its own drafters, policies and baseline, so a
cell is what a run of its own would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from eval.bench import N_WARMUP, Bench, Method, Result
from eval.lineup import Head, make_methods
from eval.progress import Running
from eval.ranks import Ranks
from eval.rows import Cell, Rows, as_row
from eval.summary import Contention, clean
from eval.tasks import Dialogues
from mmspec import metrics
from mmspec.methods import Settings
from mmspec.records import Quarantine, Record
from mmspec.sampling import KeyedSampler, make_sampler
from mmspec.types import Target
from mmspec.verify import RejectionVerifier


@dataclass
class Work:
    """What all cells of a run share.

    Args:
        args: checked options.
        ranks: this process among its peers.
        target: of everyone.
        heads: were checked against it.
        named, given: training-free methods and their settings.
        records: this process's.
        n_read: records there were, good and bad, of all processes.
        system: text.
        quarantine: of this process.
        rows: where results go and come from.
        facts: of the run and of this sitting, for every line.
        costs: folder of measured costs.
        console: for the progress bar.
        noted: ids of records that are in the quarantine.
    """

    args: argparse.Namespace
    ranks: Ranks
    target: Target
    heads: Sequence[Head]
    named: Sequence[str]
    given: Settings
    records: Sequence[Record]
    n_read: int
    system: str
    quarantine: Quarantine
    rows: Rows
    facts: Mapping[str, Any]
    costs: Path
    console: Console
    noted: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Decoded:
    """What came of a cell beside its lines.

    Args:
        names: of the methods, plain decoding first, the primary last.
        how: their settings.
    """

    cell: Cell
    names: list[str]
    how: dict[str, Any]


def cells(args: argparse.Namespace) -> list[Cell]:
    """All batch sizes with all temperatures, in the order they were given."""
    return [(batch, temperature) for batch in args.batch_size for temperature in args.temperature]


def decode(work: Work, cell: Cell) -> Decoded:
    """Warm up, then decode everything that is not known yet, writing each group as soon as it is done.

    Raises:
        InputError: more than `--max-bad-share` of the records turned out unusable; and see `Rows.check_costs`.
    """
    args, (batch, temperature) = work.args, cell
    bench, methods, how = _bench(work, cell)
    names = [method.name for method in methods]
    facts = {
        method.name: {**work.facts, "batch": batch, "temperature": temperature, **method.facts} for method in methods
    }
    dialogues = Dialogues(
        work.target, work.records, work.system, args.max_new_tokens, work.quarantine, args.history, work.noted
    )
    contention = Contention()
    bench.warm_up(dialogues.warmup(max(N_WARMUP, min(batch, 8))))
    label = "decoding" if len(cells(args)) == 1 else f"batch {batch}, T = {temperature:g}"
    running = Running(work.console, dialogues.n_turns, names[-1], label)
    recall = partial(work.rows.recall, cell, names)
    costs = {method.name: method.facts.get("costs") for method in methods}
    known: set[int] = set()

    def remembered(number: int, group: Any) -> list[Result] | None:
        results = recall(number, group)
        if results is None:
            work.rows.check_costs(cell, costs)
        else:
            known.add(number)
        return results

    def on_group(group: list[Result]) -> None:
        if group[0].group not in known:
            busy = {"busy": contention.busy()}
            work.rows.append(clean(as_row(result, facts[result.method] | busy)) for result in group)
        work.quarantine.check(work.n_read, args.max_bad_share)
        running.update(group, dialogues.n_turns, work.quarantine.count)

    with running.progress:
        bench.run(dialogues, on_group, remembered)
    work.quarantine.check(work.n_read, args.max_bad_share)
    return Decoded(cell, names, how)


def _bench(work: Work, cell: Cell) -> tuple[Bench, list[Method], dict[str, Any]]:
    """The cell's methods and what runs them."""
    args, (batch, temperature) = work.args, cell
    sampler = make_sampler(
        temperature, args.top_k, args.top_p, args.seed, args.repetition_penalty, args.no_repeat_ngram
    )
    rejects = args.verifier == "rejection"
    # The first process measures costs, the others find them: one table, one sequence of plans.
    methods, how = work.ranks.in_turn(
        lambda: make_methods(
            work.target,
            work.heads,
            batch,
            sampler if rejects or args.share_noise else None,
            (args.draft_widths or [1]) if rejects else (),
            work.named,
            work.given,
            args.method_budget,
            work.costs,
        )
    )
    verifier = RejectionVerifier(sampler) if isinstance(sampler, KeyedSampler) and rejects else None
    tie_gap = metrics.TIE_GAPS[args.dtype]
    rank, size = work.ranks.rank, work.ranks.size
    bench = Bench(work.target, methods, sampler, batch, tie_gap, verifier, rank, size, args.frozen)
    return bench, methods, how
