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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _bench import add_common, check, conversation, environment, interleaved, publish, ratio, synchronise, timed
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from mmspec import checkpoint as checkpoints
from mmspec.api import make_drafter
from mmspec.assets import resolve
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.pld import Config as LookupConfig
from mmspec.drafters.pld import PromptLookupDrafter
from mmspec.heads import eagle
from mmspec.loop import all_complete, generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.synth import SPLITS, sample
from mmspec.targets import load_target
from mmspec.tree import chain, root_only
from mmspec.types import Drafter, InputError, Output, Plan, Policy, Request, StepTrace

LOOKUP = LookupConfig(max_ngram=2, min_ngram=1, num_pred=10, prefer="first")  # transformers' defaults
ACCEPTANCE = (0.5, 0.7, 0.9, 1.0)
ORACLE_DEPTH = 5
BATCHES = (1, 2, 4, 8, 16)
TREE = checkpoints.DraftTree(depth=5, width=2, budget=7)


class Bench:
    """A target, prompts, and the clock.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.target = load_target(args.target, args.dtype, args.device)
        self.requests = self._requests(args.prompts)
        self.bar = tqdm(total=5 * args.repeats, unit="pass", desc="bench_loop", disable=not sys.stderr.isatty())
        self.note, self.tree, self.head = self._head()

    def _requests(self, n: int) -> list[Request]:
        requests = []
        for i in range(n):
            one = sample("test", i * SPLITS["test"] // n)
            content = [{"type": "image"}, {"type": "text", "text": one.turns[0]}]
            prompt = self.target.encode([{"role": "user", "content": content}], [one.image])
            requests.append(Request(str(i), prompt, self.args.max_new_tokens, i))
        return requests

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
        head = eagle.Head(eagle.Config().resolve(self.target.shape))
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

    def against_generate(self) -> dict[str, float]:
        """`null_vs_generate` and `ngram_vs_prompt_lookup`; the tokens must be the same."""
        name = self.args.target
        theirs: Any = AutoModelForImageTextToText.from_pretrained(resolve(name), dtype=self.target.dtype)
        theirs = theirs.to(self.target.device).eval()

        def transformers(requests: Sequence[Request], **settings: Any) -> list[list[int]]:
            tokens = []
            for request in requests:
                ids = request.prompt.input_ids.to(self.target.device).unsqueeze(0)
                pixels = {k: v.to(self.target.device) for k, v in request.prompt.pixels.items()}
                pixels = {k: v.to(self.target.dtype) if v.is_floating_point() else v for k, v in pixels.items()}
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

    def against_model(self) -> dict[str, Any]:
        """Speedups of an oracle drafter, measured and predicted from acceptance and the costs of bare passes."""
        plain = self.run(NullDrafter(), SkipPolicy())[1]
        truth = {request.id: output.tokens for request, output in zip(self.requests, plain)}
        policy = FixedPolicy(ORACLE_DEPTH, ORACLE_DEPTH)
        oracles = [Oracle(truth, p, self.target.shape.vocab_size) for p in ACCEPTANCE]
        works = [lambda: _decoding(self.run(NullDrafter(), SkipPolicy())[1])]
        works += [lambda o=o: _decoding(self.run(o, policy)[1]) for o in oracles]  # type: ignore[misc]
        works += [lambda n=n: self._pass(n) for n in (1, ORACLE_DEPTH + 1)]  # type: ignore[misc]
        null, *measured, one, many = self.interleaved(works)
        rows = {}
        for oracle, seconds in zip(oracles, measured):
            traces: list[StepTrace] = []
            _, outputs = self.run(oracle, policy, traces=traces)
            tokens = sum(len(o.tokens) - 1 for o in outputs)
            drafted = [t for t in traces if t.n_nodes > 1]
            draft_s = sum(t.draft_s for t in drafted)
            # Near its limit a request has less to draft: passes of fewer nodes are priced in between.
            slope = (statistics.median(many) - statistics.median(one)) / ORACLE_DEPTH
            passes = sum(statistics.median(one) + slope * (t.n_nodes - 1) for t in traces)
            predicted = tokens * statistics.median(one) / (passes + draft_s)
            rows[str(oracle.p)] = {"measured": ratio(null, seconds), "predicted": predicted}
        worst = min(row["measured"] / row["predicted"] for row in rows.values())
        return {"measured_vs_model": worst, "oracle": rows}

    def _pass(self, n_nodes: int, passes: int = 40) -> float:
        """Seconds of one bare target pass over a chain, at a context in the middle of the answers."""
        state = self.target.open(1, 512)
        prompt = self.requests[0].prompt
        with torch.inference_mode():
            self.target.prefill(state, 0, prompt)
            tokens = torch.full((1, n_nodes), 5, device=self.target.device)
            trees = chain(tokens) if n_nodes > 1 else root_only(tokens[:, 0])
            return self.timed(lambda: [self.target.forward(state, trees) for _ in range(passes)]) / passes

    # --- batches

    def by_batch(self) -> dict[str, Any]:
        """Tokens per second and median latency by batch size."""
        policy = FixedPolicy(self.tree.depth, self.tree.budget)
        requests = [Request(str(i), r.prompt, r.max_new_tokens, i) for i, r in enumerate(self.requests * 4)]
        requests = requests[: max(BATCHES) * 2]
        table: dict[str, Any] = {}
        for batch in BATCHES:
            methods = {"plain": (NullDrafter(), SkipPolicy()), "head": (self.head, policy)}
            row: dict[str, Any] = {}
            for name, (drafter, how) in methods.items():
                seconds, outputs = self.run(drafter, how, batch, requests)
                row[name] = {
                    "tokens_per_s": sum(len(o.tokens) for o in outputs) / seconds,
                    "latency_p50_s": statistics.median(o.latency_s for o in outputs),
                }
            row["speedup"] = row["head"]["tokens_per_s"] / row["plain"]["tokens_per_s"]
            table[str(batch)] = row
        return table


class Calls:
    """Records the calls of target and head modules during a run, and replays them alone.

    A call is kept with its inputs and with where its cache stood, so a replay does the same work on the same shapes.
    """

    def __init__(self, target: Any, drafter: Any) -> None:
        self.target, self.drafter = target, drafter
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any, tuple[int | None, int]]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record everything that runs inside."""
        inner = self.target.model.model
        vision = [m for name, m in inner.named_children() if "language" not in name]
        head = self.drafter.head
        handles, depth = [], [0]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if depth[0] == 0:
                cache = kwargs.get("past_key_values")
                kv = cache.layers[0].kv if cache is not None else self.drafter.kv if module is head.block else None
                where = (kv._row, kv.offset) if kv is not None else (None, 0)
                self.calls.append((module, args, dict(kwargs), kv, where))
            depth[0] += 1

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            depth[0] -= 1

        def kept(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                if depth[0] == 0:  # else it is a part of a recorded call
                    self.calls.append((method, args, {}, None, (None, 0)))
                return method(*args)

            return call

        # What the catch-up computes of the block, in parts.
        parts = ("keys_values", "project", "finish")
        for name in parts:
            head.block.__dict__[name] = kept(getattr(head.block, name))
        ends = [self.target.embedding, self.target.lm_head]
        for module in [*vision, self.target.text_model, *ends, head.fc, head.block]:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name in parts:
                del head.block.__dict__[name]

    @torch.inference_mode()
    def replay(self) -> None:
        """Every recorded call again, in order, with nothing in between."""
        current = self.drafter.kv
        for module, args, kwargs, kv, where in self.calls:
            if kv is not None:
                kv._row, kv.offset = where
                self.drafter.kv = kv  # the head's attention looks it up; the target's cache is among its arguments
            module(*args, **kwargs)
        self.drafter.kv = current


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


def _decoding(outputs: Sequence[Output]) -> float:
    """Seconds after the first tokens: prefills are the same for every drafter."""
    return sum(o.latency_s - o.ttft_s for o in outputs)


def _share(mine: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    return sum(list(a) == list(b) for a, b in zip(mine, theirs)) / len(mine)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    add = parser.add_argument
    add("--ckpt", type=Path, metavar="DIR", help="run folder with a head (default: an untrained one)")
    add("--prompts", type=int, default=12, help="how many (default %(default)s)")
    add("--max-new-tokens", type=int, default=64, help="per prompt (default %(default)s)")
    add("--repeats", type=int, default=5, help="of each comparison (default %(default)s)")
    args = parser.parse_args(argv)
    check(args, "prompts", "max_new_tokens", "repeats")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints.

    Returns:
        0, or 2 for wrong input.
    """
    try:
        args = arguments(argv)
        torch.set_num_threads(args.threads)
        bench = Bench(args)
    except InputError as error:
        print(f"bench_loop: error: {error}", file=sys.stderr)
        return 2
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
