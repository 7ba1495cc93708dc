"""Measures the decode loop against what it could reach, as ratios within one run.

    python scripts/bench_loop.py --json OUT [--ckpt runs/viskip_tiny] [--device cuda --dtype bfloat16]

What is printed and written (medians of interleaved repeats; the names are the JSON keys):

  null_vs_generate        seconds of transformers' `generate` / seconds of this loop without drafting, same tokens
  ngram_vs_prompt_lookup  seconds of `generate(prompt_lookup_num_tokens=10)` / seconds of this loop with the same lookup
  loop_efficiency_b1, b8  bare module calls of a run (target and head), replayed alone / seconds of the run
  measured_vs_model       speedup of an oracle drafter / speedup predicted from acceptance and the costs of a pass; the
                          smallest over acceptance 0.5, 0.7, 0.9, 1.0
  by_batch                tokens/s and median latency at batch 1, 2, 4, 8, 16, without drafting and with the head
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from _bench import add_common, check, conversation, environment, interleaved, publish, ratio, synchronise, timed
from _calls import Calls
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from mmspec import checkpoint as checkpoints
from mmspec.api import make_drafter
from mmspec.arguments import Parser, command
from mmspec.assets import resolve
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.pld import Config as LookupConfig
from mmspec.drafters.pld import PromptLookupDrafter
from mmspec.heads import eagle
from mmspec.loop import all_complete, generate
from mmspec.metrics import mat
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.synth import SPLITS, sample
from mmspec.targets import load_target
from mmspec.targets.base import HFTarget
from mmspec.tree import chain, root_only
from mmspec.types import Drafter, Output, Plan, Policy, Request, StepTrace

LOOKUP = LookupConfig(max_ngram=2, min_ngram=1, num_pred=10, prefer="first")  # transformers' defaults
ACCEPTANCE = (0.5, 0.7, 0.9, 1.0)
ORACLE_DEPTH = 5
BATCHES = (1, 2, 4, 8, 16)
MOST_NODES = 64
TREE = checkpoints.DraftTree(depth=5, width=2, budget=7)


class Bench:
    """A target, prompts, and the clock.

    Args:
        args: the command line.
        target: another than the command line names.
    """

    def __init__(self, args: argparse.Namespace, target: HFTarget | None = None) -> None:
        self.args = args
        self.target = target or load_target(args.target, args.dtype, args.device)
        self.requests = self._requests(args.prompts)
        n_passes = (4 + len(BATCHES)) * args.repeats
        self.bar = tqdm(total=n_passes, unit="pass", desc="bench_loop", disable=not sys.stderr.isatty())
        self.note, self.tree, self.head = self._head()

    def _requests(self, n: int) -> list[Request]:
        requests = []
        for i in range(n):
            one = sample("test", i * SPLITS["test"] // n)
            content = [{"type": "image"}, {"type": "text", "text": one.turns[0]}]
            prompt = self.target.encode([{"role": "user", "content": content}], [self.picture(one.image)])
            requests.append(Request(str(i), prompt, self.args.max_new_tokens, i))
        return requests

    def picture(self, image: Image.Image) -> Image.Image:
        """What a target is shown of a synthetic picture."""
        return image

    def _text_requests(self) -> list[Request]:
        """Conversations whose earlier answers are there to copy from, without their image."""
        requests = []
        for i in range(self.args.prompts):
            talk = conversation(i)
            talk.append(talk[0])
            requests.append(Request(str(i), self.target.encode(talk, []), self.args.max_new_tokens, i))
        return requests

    def _head(self) -> tuple[str, checkpoints.DraftTree, Any]:
        if self.args.ckpt is not None:
            loaded = checkpoints.load(self.args.ckpt)
            loaded.check_target(self.target)
            return f"head of {self.args.ckpt}", loaded.tree, make_drafter(loaded, self.target)
        torch.manual_seed(0)
        head = eagle.Head(eagle.Config().resolve(self.target.shape)).to(self.target.device, self.target.dtype).eval()
        return (
            "untrained head (its passes cost the same; give --ckpt for real speed)",
            TREE,
            head.drafter(self.target, TREE.width),
        )

    def run(
        self,
        drafter: Drafter,
        policy: Policy,
        batch: int = 1,
        requests: Sequence[Request] | None = None,
        traces: list[StepTrace] | None = None,
    ) -> tuple[float, list[Output]]:
        """Seconds and outputs of one pass over the prompts."""
        wanted = list(requests or self.requests)
        synchronise(self.target.device)
        start = time.perf_counter()
        outputs = generate(self.target, wanted, drafter, policy, GreedySampler(), batch, traces=traces)
        synchronise(self.target.device)
        return time.perf_counter() - start, all_complete(outputs)

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds of one call."""
        return timed(self.target.device, work)

    def interleaved(self, works: Sequence[Callable[[], float]]) -> list[list[float]]:
        """Seconds of each work in each repeat."""
        return interleaved(works, self.args.repeats, self.bar.update)

    # --- against transformers

    def reference(self) -> Any:
        """The target as transformers loads it."""
        theirs: Any = AutoModelForImageTextToText.from_pretrained(resolve(self.args.target), dtype=self.target.dtype)
        return theirs.to(self.target.device).eval()

    def against_generate(self) -> dict[str, float]:
        """`null_vs_generate` and `ngram_vs_prompt_lookup`; the tokens must be the same."""
        theirs = self.reference()

        def transformers(requests: Sequence[Request], **settings: Any) -> list[list[int]]:
            tokens = []
            for request in requests:
                ids = request.prompt.input_ids.to(self.target.device).unsqueeze(0)
                pixels = {k: v.to(self.target.device) for k, v in request.prompt.pixels.items()}
                pixels = {k: v.to(self.target.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
                if "image_grid_thw" in pixels:
                    pixels["mm_token_type_ids"] = request.prompt.visual.int().unsqueeze(0).to(self.target.device)
                limits = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "use_cache": True}
                with torch.inference_mode():
                    out = theirs.generate(input_ids=ids, **pixels, **limits, **settings)
                tokens.append(out[0, ids.shape[1] :].tolist())
            return tokens

        lookup = {"prompt_lookup_num_tokens": LOOKUP.num_pred, "max_matching_ngram_size": LOOKUP.max_ngram}
        ngram = PromptLookupDrafter(LOOKUP)
        depth = FixedPolicy(LOOKUP.num_pred, LOOKUP.num_pred)
        # Without images: transformers' lookup drafts their placeholders too, and its forward then refuses them.
        texts = self._text_requests()
        mine = [o.tokens for o in self.run(NullDrafter(), SkipPolicy())[1]]
        drafted = [o.tokens for o in self.run(ngram, depth, 1, texts)[1]]
        same = {
            "null": _share(mine, transformers(self.requests)),
            "ngram": _share(drafted, transformers(texts, **lookup)),
        }
        plain, null, theirs_ngram, ours_ngram = self.interleaved(
            [
                lambda: self.timed(lambda: transformers(self.requests)),
                lambda: self.run(NullDrafter(), SkipPolicy())[0],
                lambda: self.timed(lambda: transformers(texts, **lookup)),
                lambda: self.run(ngram, depth, 1, texts)[0],
            ]
        )
        return {
            "null_vs_generate": ratio(plain, null),
            "ngram_vs_prompt_lookup": ratio(theirs_ngram, ours_ngram),
            "same_tokens_as_generate": same["null"],
            "same_tokens_as_prompt_lookup": same["ngram"],
        }

    # --- against its own modules

    def efficiency(self, batch: int) -> float:
        """Share of a run's seconds that its bare module calls need when nothing surrounds them.

        On a GPU both sides run without CUDA graphs, whose replays call no module.
        """
        self.target.static, static = False, self.target.static
        policy = FixedPolicy(self.tree.depth, self.tree.budget)
        requests = [r for r in self.requests for _ in range(1 if batch == 1 else 2)][: max(batch, len(self.requests))]
        requests = [Request(str(i), r.prompt, r.max_new_tokens, i) for i, r in enumerate(requests)]
        calls = Calls(self.target, self.head)
        with calls.recorded():
            self.run(self.head, policy, batch, requests)
        bare, whole = self.interleaved(
            [lambda: self.timed(calls.replay), lambda: self.run(self.head, policy, batch, requests)[0]]
        )
        self.target.static = static
        return ratio(bare, whole)

    # --- against arithmetic

    def against_model(self, batch: int = 1) -> dict[str, Any]:
        """Speedups of an oracle drafter, measured and predicted from acceptance and the costs of bare passes.

        Args:
            batch: rows decoded together; above 1 as many requests.
        """
        requests = self.requests
        if batch > 1:
            turns = [self.requests[i % len(self.requests)] for i in range(batch)]
            requests = [Request(str(i), r.prompt, r.max_new_tokens, i) for i, r in enumerate(turns)]
        plain_traces: list[StepTrace] = []
        plain = self.run(NullDrafter(), SkipPolicy(), batch, requests, plain_traces)[1]
        truth = {request.id: output.tokens for request, output in zip(requests, plain)}
        policy = FixedPolicy(ORACLE_DEPTH, ORACLE_DEPTH)
        oracles = [Oracle(truth, p, self.target.shape.vocab_size) for p in ACCEPTANCE]

        def seconds_of(drafter: Drafter, how: Policy) -> float:
            return _decoding(self.run(drafter, how, batch, requests)[1], batch)

        works = [lambda: seconds_of(NullDrafter(), SkipPolicy())]
        works += [lambda o=o: seconds_of(o, policy) for o in oracles]  # type: ignore[misc]
        works += [lambda n=n: self.bare_pass(n, batch) for n in (1, ORACLE_DEPTH + 1)]  # type: ignore[misc]
        null, *measured, one, many = self.interleaved(works)
        rows = {}
        for oracle, seconds in zip(oracles, measured):
            traces: list[StepTrace] = []
            _, outputs = self.run(oracle, policy, batch, requests, traces)
            drafted = [t for t in traces if t.n_nodes > 1]
            draft_s = sum(t.draft_s for t in drafted)
            # Near its limit a request has less to draft: passes of fewer nodes are priced in between.
            slope = (statistics.median(many) - statistics.median(one)) / ORACLE_DEPTH
            passes = sum(statistics.median(one) + slope * (t.n_nodes - 1) for t in traces)
            predicted = len(plain_traces) * statistics.median(one) / (passes + draft_s)
            rows[str(oracle.p)] = {"measured": ratio(null, seconds), "predicted": predicted, "mat": mat(outputs)}
        worst = min(row["measured"] / row["predicted"] for row in rows.values())
        return {"measured_vs_model": worst, "oracle": rows}

    def bare_pass(self, n_nodes: int, batch: int = 1, passes: int = 40) -> float:
        """Seconds of one bare target pass over a chain, at a context in the middle of the answers."""
        prompt = self.requests[0].prompt
        # No smaller than what `generate` opens: buffers that are kept, and graphs captured over them, serve both.
        longest = max(len(request.prompt) for request in self.requests)
        state = self.target.open(batch, max(512, longest + self.args.max_new_tokens + 2 * MOST_NODES))
        with torch.inference_mode():
            for row in range(batch):
                self.target.prefill(state, row, prompt)
            tokens = torch.full((batch, n_nodes), 5, device=self.target.device)
            trees = chain(tokens) if n_nodes > 1 else root_only(tokens[:, 0])
            self.target.forward(state, trees)  # a shape that is new to a GPU is captured
            return self.timed(lambda: [self.target.forward(state, trees) for _ in range(passes)]) / passes

    # --- batches

    def by_batch(self) -> dict[str, Any]:
        """By batch size: tokens per second and median latency without drafting and with the head, and its speedup."""
        requests = [Request(str(i), r.prompt, r.max_new_tokens, i) for i, r in enumerate(self.requests * 4)]
        return {str(batch): self._at_batch(batch, requests[: max(BATCHES) * 2]) for batch in BATCHES}

    def _at_batch(self, batch: int, requests: Sequence[Request]) -> dict[str, Any]:
        """A row of `by_batch`: medians of the repeats."""
        head = self.head, FixedPolicy(self.tree.depth, self.tree.budget)
        methods: dict[str, tuple[Drafter, Policy]] = {"plain": (NullDrafter(), SkipPolicy()), "head": head}
        outputs: dict[str, list[list[Output]]] = {name: [] for name in methods}

        def seconds_of(name: str) -> float:
            seconds, found = self.run(*methods[name], batch, requests)
            outputs[name].append(found)
            return seconds

        taken = self.interleaved([partial(seconds_of, name) for name in methods])
        row: dict[str, Any] = {}
        for name, seconds in zip(methods, taken):
            counted = outputs[name][1:]  # the first pass warms up
            row[name] = {
                "tokens_per_s": sum(len(o.tokens) for o in counted[0]) / statistics.median(seconds),
                "latency_p50_s": statistics.median(o.latency_s for some in counted for o in some),
            }
        return row | {"speedup": ratio(*taken)}


class Oracle:
    """Drafts the true continuation, in which each token is wrong with probability 1 - p, always the same ones."""

    taps: tuple[int, ...] = ()

    def __init__(self, truth: dict[str, list[int]], p: float, vocab: int) -> None:
        self.p = p
        self.lines = {}
        for id, tokens in truth.items():
            rng = random.Random(f"{id}/{p}")
            self.lines[id] = [t if rng.random() < p else (t + 1) % vocab for t in tokens] + [0] * ORACLE_DEPTH

    def open(self, max_batch: int, max_tokens: int) -> None:
        self.at: list[tuple[str, int]] = [("", 0)] * max_batch

    def admit(self, row: int, request: Request, forward: Any, root: Tensor) -> None:
        self.at[row] = (request.id, 1)

    def evict(self, row: int) -> None:
        self.at[row] = ("", 0)

    def observe(self, round: Any) -> None:
        self.at = [(id, n + len(new)) for (id, n), new in zip(self.at, round.tokens)]

    def propose(self, roots: Tensor, plan: Plan) -> Any:
        rows = [self.lines[id][n : n + plan.depth] if id else [0] * plan.depth for id, n in self.at]
        return chain(torch.cat([roots.unsqueeze(1), torch.tensor(rows, device=roots.device)], 1))


def _decoding(outputs: Sequence[Output], batch: int) -> float:
    """Seconds after the first tokens: prefills are the same for every drafter.

    Args:
        outputs: of requests that were decoded one by one, or all together.
        batch: how many together.
    """
    total = 0.0
    for group in (outputs[i : i + batch] for i in range(0, len(outputs), batch)):
        starts = [0.0, *accumulate(o.ttft_s for o in group)]  # prefills follow one another
        total += max(start + o.latency_s for start, o in zip(starts, group)) - starts[-1]
    return total


def _share(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    return sum(list(a) == list(b) for a, b in zip(mine, theirs)) / len(mine)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__)
    add_common(parser)
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="DIR", help="run folder with a head (default: an untrained one)")
    add("--prompts", type=int, default=12, help="how many (default %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="per prompt (default %(default)s)")
    add("--repeats", type=int, default=5, help="of each comparison (default %(default)s)")
    args = parser.parse_args(argv)
    check(args, "prompts", "max_new_tokens", "repeats")
    return args


@command("bench_loop")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    bench = Bench(args)
    figures: dict[str, Any] = bench.against_generate()
    figures["loop_efficiency_b1"] = bench.efficiency(1)
    figures["loop_efficiency_b8"] = bench.efficiency(8)
    figures |= bench.against_model()
    figures["by_batch"] = bench.by_batch()
    bench.bar.close()
    figures["settings"] = environment(args) | {
        "head": bench.note,
        "tree": [bench.tree.depth, bench.tree.width, bench.tree.budget],
        "prompts": args.prompts,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
    }
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
