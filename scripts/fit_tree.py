"""Fits a static draft tree to a target: the nodes that are worth their place, for a head or for Token Recycling.

    python scripts/fit_tree.py --ckpt runs/viskip_tiny --budget 16
    python scripts/fit_tree.py --method recycling --target tiny_llava --budget 16 --out runs/recycling_tree.json

Decodes held-out prompts with the target and counts, at each depth, how often the candidate of each rank is the next
token given that everything before it was right. Then the node with the most likely path is added until the budget is
spent (the recipe of Medusa), so the first n nodes of the file are the best tree of n nodes. What is printed is tau
expected from these counts, of the fitted tree and of the method's usual one, cut to the same number of nodes.

A head's ranks are those of its unrolled training forward on the target's own answers; the tree goes to
static_tree.json in its run folder, beside the dynamic tree.json, which stays as it is; decode with it by the policy
`static` (`python -m eval.mmspec --policies fixed static`). Token Recycling's ranks are
taken from its own rounds; decode with the tree by the method's setting `tree`.

Fit on data you do not report on: synth:val is there for tuning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from eval.mmspec import open_target, output_folder
from eval.options import add_records, add_target
from eval.tasks import (
    Dialogues,
    check_left_out,
    data_folder,
    data_name,
    limit_pixels,
    load_records,
    system_text,
)
from mmspec import checkpoint as checkpoints
from mmspec.api import STATIC_TREE, find_device, make_drafter
from mmspec.arguments import Parser, at_least, command
from mmspec.drafters import recycling
from mmspec.heads._objective import SteppedHead
from mmspec.hub import run_folder
from mmspec.loop import all_complete, generate
from mmspec.policy import FixedPolicy
from mmspec.records import Quarantine
from mmspec.sampling import GreedySampler
from mmspec.static_tree import EAGLE_25, TOKEN_RECYCLING_80, StaticTree, expected_tau, fit
from mmspec.types import Drafter, InputError, Prompt, Request, Round, Target

RANKS = recycling.Config().k
"""Ranks that are told apart; a token of a higher one counts as missed."""


class Counts:
    """How often which rank was right.

    Args:
        depth: levels to tell apart.
    """

    def __init__(self, depth: int) -> None:
        self.hits = torch.zeros((depth, RANKS), dtype=torch.long)
        self.trials = torch.zeros(depth, dtype=torch.long)

    def add(self, depth: int, ranks: Tensor) -> None:
        """Take in the ranks [n] int64 of true tokens below accepted nodes of a depth; RANKS and above are misses."""
        self.trials[depth] += len(ranks)
        self.hits[depth] += ranks.clamp_max(RANKS).bincount(minlength=RANKS + 1)[:RANKS].cpu()

    def rates(self) -> list[list[float]]:
        """See `mmspec.static_tree.Rates`."""
        rates: list[list[float]] = (self.hits / self.trials.clamp_min(1).unsqueeze(1)).tolist()
        return rates


class CountingRecycler(recycling.RecyclingDrafter):
    """Token Recycling that looks up which of its successors the target went on with, before it learns of it."""

    def __init__(self, target: Target, counts: Counts) -> None:
        super().__init__(recycling.Config(), target)
        self.counts = counts

    def observe(self, round: Round) -> None:
        for row, decided in enumerate(round.tokens):
            if decided:
                truth = torch.tensor(decided, device=self.target.device)
                path = torch.cat([round.trees.tokens[row, :1], truth[:-1]])
                right = self.matrix[row, path] == truth.unsqueeze(1)
                ranks = torch.where(right.any(1), right.int().argmax(1), RANKS)
                for depth, rank in enumerate(ranks[: len(self.counts.trials)].split(1)):
                    self.counts.add(depth, rank)
        super().observe(round)


@torch.inference_mode()
def count_head(head: SteppedHead, target: Target, request: Request, tokens: Sequence[int], counts: Counts) -> None:
    """Counts the ranks that a head gives to the target's own answer, having drafted what precedes each token of it."""
    prompt, answer = request.prompt, torch.tensor(tokens)
    ids = torch.cat([prompt.input_ids, answer])
    visual = torch.cat([prompt.visual, torch.zeros(len(answer), dtype=torch.bool)])
    marks = (torch.arange(len(ids)) >= len(prompt)).long()
    features = target.teacher([Prompt(ids, visual, prompt.pixels)], [marks], head.taps)
    # The first pair is the one whose token begins the answer; its output predicts the token two further on.
    for step, states in enumerate(head.unroll(features, len(counts.trials))[1]):
        truth = ids[len(prompt) + 1 + step :].to(target.device)
        if not len(truth):
            break
        logits = head.step_logits(step, states[: len(truth)], target.unembed)
        # A token outside of the head's own vocabulary is a miss.
        scores = logits.new_full((len(logits), target.shape.vocab_size), float("-inf"))
        scores[:, head.target_ids(torch.arange(logits.shape[1], device=logits.device))] = logits
        true = scores.gather(1, truth.unsqueeze(1))
        counts.add(step, torch.where(true.isinf(), RANKS, (scores > true).sum(1, keepdim=True)).squeeze(1))


def answers(
    target: Target, dialogues: Dialogues, drafter: Drafter, shape: tuple[int, int], batch: int
) -> Iterator[tuple[Request, list[int]]]:
    """All requests and the target's greedy answers; drafting changes none of them.

    Args:
        shape: depth and budget to draft with.
        batch: requests decoded together.
    """
    policy = FixedPolicy(*shape)
    with tqdm(total=dialogues.n_turns, unit="answer", desc="fit_tree", disable=not sys.stderr.isatty()) as bar:
        for group in dialogues.groups(batch):
            requests = [task.request for task in group]
            outputs = all_complete(generate(target, requests, drafter, policy, GreedySampler(), batch))
            for task, output in zip(group, outputs):
                dialogues.answer(task, target.decode(output.tokens))
                yield task.request, output.tokens
            bar.update(len(group))


def measure(args: argparse.Namespace) -> tuple[Target, Counts]:
    """Counts on held-out prompts.

    Raises:
        InputError: a checkpoint, a target or data that cannot be used, or too much of the data.
    """
    checkpoint = checkpoints.load(args.ckpt, args.target, args.dtype) if args.ckpt else None
    quarantine = Quarantine(None)
    records = load_records(data_folder(args.data), args.limit, quarantine, args.max_bad_share)
    target = open_target([checkpoint] if checkpoint else [], args.target, args.dtype, args.device)
    limit_pixels(target, None)
    dialogues = Dialogues(target, records, system_text(target), args.max_new_tokens, quarantine)
    counts = Counts(args.depth)
    if checkpoint is None:
        # With as many nodes as it shall have: the fewer are verified, the less the matrix knows.
        shape = args.usual.depth, args.budget
        for _ in answers(target, dialogues, CountingRecycler(target, counts), shape, args.batch_size):
            pass
        check_left_out(quarantine, args.max_bad_share)
        return target, counts
    head: Any = checkpoint.head(target.dtype).to(target.device)
    if not isinstance(head, SteppedHead):
        raise InputError(f"--ckpt {args.ckpt} is a head of kind {checkpoint.kind}, which drafts no trees of ranks")
    shape = checkpoint.tree.depth, checkpoint.tree.budget
    for request, tokens in answers(target, dialogues, make_drafter(checkpoint, target), shape, args.batch_size):
        count_head(head, target, request, tokens, counts)
    check_left_out(quarantine, args.max_bad_share)
    return target, counts


def table(fitted: StaticTree, usual: StaticTree, rates: list[list[float]]) -> str:
    """Expected tau of both trees at budgets that double."""
    lines = ["nodes   fitted   usual"]
    budget, budgets = 1, []
    while budget < fitted.budget:
        budgets.append(budget)
        budget *= 2
    for budget in [*budgets, fitted.budget]:
        taus = [expected_tau(tree.cut(budget, tree.depth), rates) for tree in (fitted, usual)]
        lines.append(f"{budget:5}    {taus[0]:5.2f}   {taus[1]:5.2f}")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: a value that cannot be.
    """
    parser = Parser(description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="DIR", help="run folder with a head")
    what.add_argument("--method", choices=("recycling",), help="a method without weights")
    add = parser.add_argument
    add("--budget", type=int, metavar="N", help="draft nodes (default: as many as the method's usual tree)")
    add("--depth", type=int, default=6, metavar="D", help="levels (default 6)")
    add("--out", type=Path, metavar="FILE", help="default: static_tree.json in --ckpt; needed with --method")
    add_records(parser, "synth:val", 60, 128)
    add_target(parser)
    add("--batch-size", type=int, default=1, metavar="N", help="requests decoded together (default 1)")
    args = parser.parse_args(argv)
    args.usual = EAGLE_25 if args.ckpt else TOKEN_RECYCLING_80
    args.budget = args.usual.budget if args.budget is None else args.budget
    at_least(args, limit=1, budget=1, depth=1, max_new_tokens=1, batch_size=1)
    if not (args.out or args.ckpt):
        raise InputError("--out FILE says where the tree of a method without weights goes")
    if args.out:
        output_folder(args.out.parent)
    args.out = args.out or run_folder(args.ckpt, args.target, args.dtype) / STATIC_TREE
    args.device = find_device(args.device)
    return args


@command("fit_tree")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, fits, writes and prints."""
    args = arguments(argv)
    target, counts = measure(args)
    rates = counts.rates()
    try:
        tree = fit(rates, args.budget)
    except ValueError as error:
        raise InputError(f"{error} in {args.data}") from None
    fitted_to = {
        "method": args.method or "head",
        "target": Path(target.name).name,
        "fingerprint": target.fingerprint,
        "data": data_name(args.data),
        "trials": int(counts.trials[0]),
    }
    figures = {"expected_tau": expected_tau(tree, rates), "rates": rates, "fitted_to": fitted_to}
    checkpoints.write_json(args.out, {"paths": tree.paths, **figures})
    print(table(tree, args.usual, rates))
    print(f"{tree.budget} nodes on {tree.depth} levels: {args.out}")


if __name__ == "__main__":
    sys.exit(main())
