"""The parts of bench_gpu that decode: a target of full size with random weights against its device, itself and others.

    python scripts/_gpu_decode.py costs --target llava-1.5-7b --json OUT [--tiny --device cpu --dtype float32]

Parts, and what each writes:

  roofline   bytes a pass must read / the device's copy rate, against the seconds of a pass, by batch
  costs      seconds of a verification round by context, batch and nodes
  heads      seconds of drafting by kind of head, batch and depth; untrained, which costs the same
  graphs     seconds of a bare pass with CUDA graphs and without, by batch and nodes
  generate   transformers' `generate` and prompt lookup against this loop
  loop       loop efficiency at batch 1 and 8, as in bench_loop
  oracle     speedup of a drafter of given acceptance, measured and as the costs predict it, by batch
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _bench import environment, publish, timed
from _gpu_page import DECODE
from _random_target import NAMES, picture, random_target, shared_twin, weight_bytes
from bench_loop import Bench
from PIL import Image

from eval.options import DTYPES
from mmspec import checkpoint as checkpoints
from mmspec.api import find_device
from mmspec.arguments import Parser, command
from mmspec.costs import measure
from mmspec.drafters.null import NullDrafter
from mmspec.heads import medusa
from mmspec.recipe import head_kinds, import_head
from train.usage import memory_gb

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (128, 1024, 2048)
NODES = (1, 2, 4, 8, 16, 32, 64)
HEAD_DEPTH = 7


class Decode(Bench):
    """bench_loop's clock over a random target.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.tiny = bool(args.tiny)
        target = random_target(args.target, args.dtype, args.device, args.tiny)
        target.stop_ids = frozenset()  # texts of one length
        super().__init__(args, target)

    def picture(self, image: Image.Image) -> Image.Image:
        return picture(image)

    def reference(self) -> Any:
        return shared_twin(self.target.model, "sdpa")

    @property
    def batches(self) -> Sequence[int]:
        return BATCHES[:2] if self.tiny else BATCHES

    # ---- parts ----

    def roofline(self) -> dict[str, Any]:
        """By batch: seconds of a pass over one node, and what reading its bytes once takes."""
        rate = copy_rate(self.target.device, 2**24 if self.tiny else 2**30)
        shape, context = self.target.shape, len(self.requests[0].prompt)
        each = 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * self.target.lm_head.weight.element_size()
        weights, rows = weight_bytes(self.target), {}
        for batch in self.batches:
            (taken,) = self.interleaved([lambda b=batch: self.bare_pass(1, b, 20)])  # type: ignore[misc]
            seconds = statistics.median(taken)
            bound = (weights + batch * context * each) / rate
            rows[str(batch)] = {"pass_s": seconds, "bound_s": bound, "share_of_roofline": bound / seconds}
        return {
            "copy_gb_per_s": rate / 1e9, "weight_gb": weights / 1e9, "kv_bytes_per_token": each, "context": context,
            "by_batch": rows,
        }  # fmt: skip

    def costs(self) -> dict[str, Any]:
        """{context: {batch: {nodes: seconds}}}."""
        contexts, budget = ((32, 64), 7) if self.tiny else (CONTEXTS, 63)
        tables = {}
        for context in contexts:
            table = measure(self.target, NullDrafter(), self.batches[-1], 1, budget, self.args.repeats, context)
            tables[str(context)] = _plain(table.verify_s)
            self.target.free()
        return {"verify_s": tables}

    def heads(self) -> dict[str, Any]:
        """{kind: {batch: {depth: seconds}}}."""
        tables = {}
        for kind in head_kinds():
            torch.manual_seed(0)
            config = import_head(kind).Config().resolve(self.target.shape)
            depth = config.n_ahead if isinstance(config, medusa.Config) else HEAD_DEPTH
            head: Any = checkpoints.build_head(kind, config)
            drafter = head.to(self.target.device, self.target.dtype).eval().drafter(self.target, 2)
            depth = min(depth, 2) if self.tiny else depth
            table = measure(self.target, drafter, self.batches[-1], depth, 7, self.args.repeats)
            tables[kind] = _plain(table.draft_s)
        return {"draft_s": tables}

    def graphs(self) -> dict[str, Any]:
        """{batch: {nodes: {eager_s, graph_s, gain}}}; without a GPU `graph_s` is of passes of fixed shape."""
        rows: dict[str, Any] = {}
        nodes = NODES[:3] if self.tiny else NODES
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for batch in self.batches[:: 1 if self.tiny else 3]:
                works = [self._passing(n, batch, static) for n in nodes for static in (False, True)]
                medians = [statistics.median(times) for times in self.interleaved(works)]
                rows[str(batch)] = {
                    str(n): {"eager_s": eager, "graph_s": graph, "gain": eager / graph}
                    for n, eager, graph in zip(nodes, medians[::2], medians[1::2])
                }
        broken = sorted({str(w.message) for w in said if "CUDA graphs" in str(w.message)})
        return {"by_batch": rows, "captured": self.target.device.type == "cuda" and not broken, "said": broken}

    def _passing(self, n_nodes: int, batch: int, static: bool) -> Callable[[], float]:
        def work() -> float:
            before, self.target.static = self.target.static, static
            try:
                return self.bare_pass(n_nodes, batch, 20)
            finally:
                self.target.static = before

        return work

    def generate(self) -> dict[str, Any]:
        """As bench_loop says."""
        return dict(self.against_generate())

    def loop(self) -> dict[str, Any]:
        """As bench_loop says."""
        return {f"loop_efficiency_b{batch}": self.efficiency(batch) for batch in (1, 8)}

    def oracle(self) -> dict[str, Any]:
        """{batch: what `against_model` returns}."""
        return {"by_batch": {str(batch): self.against_model(batch) for batch in self.batches}}


def copy_rate(device: torch.device, n_bytes: int, repeats: int = 5) -> float:
    """Bytes per second that a copy reads and writes, the best of a few."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    return 2 * n_bytes / min(timed(device, lambda: sink.copy_(source)) for _ in range(repeats + 1))


def _plain(table: Mapping[int, Mapping[int, float]]) -> dict[str, dict[str, float]]:
    return {str(a): {str(b): seconds for b, seconds in row.items()} for a, row in table.items()}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        InputError: it is wrong.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("part", choices=DECODE)
    add("--target", choices=tuple(NAMES), default=next(iter(NAMES)), help="whose shape (default %(default)s)")
    add("--json", type=Path, metavar="OUT", help="write the figures there")
    add("--dtype", choices=DTYPES, default="bfloat16", help="(default %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--tiny", action="store_true", help="the same on layers of 64: whether it runs, not how fast")
    args = parser.parse_args(argv)
    args.device = find_device(args.device)
    small = {"prompts": 2, "max_new_tokens": 12, "repeats": 1, "threads": 1}
    large = {"prompts": 4, "max_new_tokens": 64, "repeats": 3, "threads": torch.get_num_threads()}
    vars(args).update(small if args.tiny else large, ckpt=None)
    return args


@command("bench_gpu")
def main(argv: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    bench = Decode(args)
    figures = getattr(bench, args.part)()
    bench.bar.close()
    figures["memory_gb"] = memory_gb(bench.target.device)
    figures["settings"] = environment(args) | {
        "part": args.part, "tiny": args.tiny, "prompts": args.prompts, "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
    }  # fmt: skip
    publish(figures, args.json)


if __name__ == "__main__":
    sys.exit(main())
