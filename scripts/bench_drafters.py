"""Measures what drafting without a head costs, against a plain decoding step, and how that grows with the text.

    python scripts/bench_drafters.py --json OUT

Each method follows a stream of synthetic conversations: it proposes behind every root, the target's part is played by
logits that choose what the stream goes on with, and the accepted path is what it had drafted of that. Only `propose`
and `observe` are timed. What is printed and written (medians over rounds and repeats; the names are the JSON keys):

  share_of_step.<method>       seconds of propose + observe at 4,096 tokens of context / those of a plain decoding step
  growth_512_8192.<method>     seconds at 8,192 tokens / seconds at 512
  microseconds.<method>        propose + observe at each length
  nodes.<method>               draft nodes a round at each length: more text to draft from can mean more to draft
  accepted.<method>            draft tokens accepted a round at each length, of this stream, not of a target's text
  step_microseconds            a plain decoding step
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from _bench import add_common, check, conversation, environment, interleaved, publish, synchronise
from torch import Tensor
from tqdm import tqdm

from mmspec.arguments import Parser, command
from mmspec.drafters.null import NullDrafter
from mmspec.loop import all_complete, generate
from mmspec.methods import make_method, method_names
from mmspec.policy import SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.types import Choices, Forward, Prompt, Request, Round, StepTrace
from mmspec.verify import MatchVerifier

AT = 4096
SHORT, LONG = 512, 8192
LENGTHS = (SHORT, AT, LONG)


class Bench:
    """A target, a stream of its tokens, and the clock.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.target = load_target(args.target, args.dtype, args.device)
        self.methods = {name: make_method(name, self.target) for name in args.method or method_names()}
        deepest = max(policy.max_depth for _, policy in self.methods.values())
        self.stream = self._stream(LONG + args.rounds * (deepest + 1) + deepest + 2)
        self.noise = torch.Generator(self.target.device).manual_seed(0)
        self.counts = {(name, length): (0.0, 0.0) for name in self.methods for length in LENGTHS}

    def _stream(self, n: int) -> Tensor:
        """[n] tokens of one conversation after the other."""
        tokens: list[int] = []
        i = 0
        while len(tokens) < n:
            tokens += self.target.encode(conversation(i), []).input_ids.tolist()
            i += 1
        return torch.tensor(tokens[:n], device=self.target.device)

    @torch.inference_mode()
    def drafting(self, name: str, length: int) -> float:
        """Median seconds of propose + observe over the rounds behind `length` tokens; notes how much was drafted."""
        drafter, policy = self.methods[name]
        at = length - 1  # of the root, the last token of the context
        ids = self.stream[:at].cpu()
        prompt = Prompt(ids, torch.zeros(at, dtype=torch.bool))
        drafter.open(1, len(self.stream))
        drafter.admit(0, Request("0", prompt, self.args.rounds), self._outputs(1, at), self.stream[at])
        seconds, nodes, accepted = [], [], []
        plan = policy.plan([[]], [len(self.stream)])
        for _ in range(self.args.rounds):
            synchronise(self.target.device)
            start = time.perf_counter()
            trees = drafter.propose(self.stream[at : at + 1], plan)
            synchronise(self.target.device)
            proposed_s = time.perf_counter() - start
            outputs = self._outputs(trees.tokens.shape[1])
            # Behind a node of depth d the target chooses what comes d + 1 tokens behind the root in the stream.
            true = self.stream[at + 1 + trees.depths]
            outputs.logits.scatter_(2, true.unsqueeze(-1), 100.0)
            zeros = torch.zeros_like(true)
            chosen = MatchVerifier().accept(trees, outputs.logits, Choices(outputs.logits, zeros[:, 0], zeros))
            kept = int(chosen.n_kept)
            told = Round(
                trees,
                outputs,
                chosen,
                (tuple(chosen.path[0, :kept].tolist()),),
                (tuple(self.stream[at + 1 : at + 1 + kept].tolist()),),
            )
            synchronise(self.target.device)
            start = time.perf_counter()
            drafter.observe(told)
            synchronise(self.target.device)
            seconds.append(proposed_s + time.perf_counter() - start)
            nodes.append(int((trees.parents >= 0).sum()))
            accepted.append(kept - 1)
            at += kept
        drafter.evict(0)
        self.counts[name, length] = statistics.mean(nodes), statistics.mean(accepted)
        return statistics.median(seconds)

    def _outputs(self, n_nodes: int, n_hidden: int = 0) -> Forward:
        """What a target pass leaves, at random: logits of each node, and states of as many nodes or of a prompt."""
        shape, device, dtype = self.target.shape, self.target.device, self.target.dtype
        logits = torch.randn((1, n_nodes, shape.vocab_size), generator=self.noise, device=device, dtype=dtype)
        hidden = torch.zeros((1, n_hidden or n_nodes, shape.hidden_size), device=device, dtype=dtype)
        return Forward(logits, hidden)

    def step(self) -> float:
        """Median seconds of a round of plain decoding."""
        prompt = self.target.encode(conversation(0)[:1], [])
        request = Request("0", prompt, self.args.rounds)
        traces: list[StepTrace] = []
        all_complete(generate(self.target, [request], NullDrafter(), SkipPolicy(), GreedySampler(), traces=traces))
        return statistics.median(t.draft_s + t.verify_s + t.commit_s + t.control_s for t in traces)

    def figures(self) -> dict[str, Any]:
        """All of them, by the names at the top of this file."""
        cells = [(name, length) for name in self.methods for length in LENGTHS]
        works = [self.step, *(lambda name=n, length=l: self.drafting(name, length) for n, l in cells)]  # type: ignore[misc]
        with tqdm(
            total=self.args.repeats, unit="repeat", desc="bench_drafters", disable=not sys.stderr.isatty()
        ) as bar:
            step, *drafting = interleaved(works, self.args.repeats, bar.update)
        seconds = {cell: statistics.median(repeats) for cell, repeats in zip(cells, drafting)}
        step_s = statistics.median(step)
        return {
            "share_of_step": {name: seconds[name, AT] / step_s for name in self.methods},
            "growth_512_8192": {name: seconds[name, LONG] / seconds[name, SHORT] for name in self.methods},
            "microseconds": {n: {str(l): seconds[n, l] * 1e6 for l in LENGTHS} for n in self.methods},
            "nodes": {n: {str(l): self.counts[n, l][0] for l in LENGTHS} for n in self.methods},
            "accepted": {n: {str(l): self.counts[n, l][1] for l in LENGTHS} for n in self.methods},
            "step_microseconds": step_s * 1e6,
        }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--method", nargs="+", metavar="NAME", help=f"of {', '.join(method_names())} (default: all)")
    add("--rounds", type=int, default=64, help="of each measurement (default %(default)s)")
    add("--repeats", type=int, default=5, help="of each measurement (default %(default)s)")
    args = parser.parse_args(argv)
    check(args, "rounds", "repeats")
    return args


@command("bench_drafters")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    figures = bench.figures()
    figures["settings"] = environment(args) | {"rounds": args.rounds, "repeats": args.repeats}
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
