"""What drafting and verifying cost on this machine: measured once, cached beside the head, keyed by hardware."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch

from mmspec.files import write_text
from mmspec.tree import chain
from mmspec.types import Choices, Drafter, Plan, Prompt, Request, State, Target, Tree
from mmspec.verify import MatchVerifier

_SCHEMA = 3
_NODES = (1, 2, 3, 5, 9, 17, 33)
"""Nodes of a round that drafts nothing, 1, 2, 4, .. nodes."""
_CONTEXT = 128
_IN_A_ROW = 4
"""Calls of one kind, the first of which is not counted."""


@dataclass(frozen=True)
class CostTable:
    """Seconds, on a grid.

    Args:
        hardware: what it was measured on, in words without host names.
        verify_s: {batch: {nodes per row, root included: seconds}} of a round without its draft.
        draft_s: {batch: {depth: seconds}}, tree building included. Without the catch-up on what the round before has
            committed: repeated calls have none, and what some drafters learn of a round would change what is timed.
    """

    hardware: str
    verify_s: Mapping[int, Mapping[int, float]]
    draft_s: Mapping[int, Mapping[int, float]]

    def verify(self, batch: int, nodes: int) -> float:
        return _lookup(self.verify_s, batch, nodes)

    def draft(self, batch: int, depth: int) -> float:
        return _lookup(self.draft_s, batch, depth)

    def flat_beyond(self, depth: int, deepest: int) -> CostTable:
        """The same where drafts stop at `depth`, whatever plans allow, down to `deepest`."""
        more = {b: {**row, max(deepest, depth): _line(row, depth)} for b, row in self.draft_s.items()}
        return replace(self, draft_s=more)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=1))

    @staticmethod
    def load(path: Path) -> CostTable:
        """Raises ValueError when the file is damaged, or its numbers meant something else."""
        raw = json.loads(path.read_text())
        try:
            if raw["schema"] != _SCHEMA:
                raise ValueError(f"{path} has schema {raw['schema']}, not {_SCHEMA}: measure it again")
            tables = [
                {int(b): {int(k): float(s) for k, s in row.items()} for b, row in raw[name].items()}
                for name in ("verify_s", "draft_s")
            ]
            return CostTable(str(raw["hardware"]), *tables)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no cost table: measure it again") from error


def _lookup(table: Mapping[int, Mapping[int, float]], batch: int, x: int) -> float:
    """Linear interpolation, and extrapolation from the last two points; batch sizes between grid points likewise."""
    return _line({b: _line(row, x) for b, row in table.items()}, batch)


def _line(points: Mapping[int, float], x: int) -> float:
    if x in points or len(points) == 1:
        return points.get(x, next(iter(points.values())))
    xs = sorted(points)
    right = next((i for i, value in enumerate(xs) if value > x), len(xs) - 1) or 1
    a, b = xs[right - 1], xs[right]
    return max(points[a] + (points[b] - points[a]) * (x - a) / (b - a), 0.0)


def hardware(target: Target) -> str:
    """The key of a cost table: device, threads, dtype and torch version.

    Of a CPU its model and vector instructions as well: what a wider pass costs differs severalfold with these.
    """
    if target.device.type == "cuda":
        name = torch.cuda.get_device_name(target.device)
    else:
        vectors = torch.backends.cpu.get_cpu_capability()
        name = f"cpu-{cpu_model()}-{vectors}-{torch.get_num_threads()}t"
    kind = str(target.dtype).removeprefix("torch.")
    return re.sub(r"[^\w.-]+", "_", "-".join([name, kind, "torch" + torch.__version__.split("+")[0]]), flags=re.ASCII)


def cpu_model() -> str:
    """The processor's marketing name where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@torch.inference_mode()
def measure(
    target: Target,
    drafter: Drafter,
    max_batch: int,
    depth: int,
    budget: int,
    repeats: int = 7,
    context: int = _CONTEXT,
) -> CostTable:
    """Time rounds over nodes and drafting over depth, at batch sizes 1, 2, 4, .. up to `max_batch`.

    The rows hold `context` tokens of arbitrary text: what a pass costs does not depend on what the tokens say.
    """
    batches = sorted({min(2**i, max_batch) for i in range(max_batch.bit_length() + 1)})
    cells = {batch: _measure_batch(target, drafter, batch, depth, budget, repeats, context) for batch in batches}
    return CostTable(hardware(target), {b: c[0] for b, c in cells.items()}, {b: c[1] for b, c in cells.items()})


def _measure_batch(
    target: Target, drafter: Drafter, batch: int, depth: int, budget: int, repeats: int, context: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds of a round by nodes, and of drafting by depth, at one batch size."""
    ids = torch.arange(context) % min(97, target.shape.vocab_size)
    ids = ids.masked_fill(ids == target.image_token_id, 0)
    prompt = Prompt(ids, torch.zeros(context, dtype=torch.bool))
    request = Request("costs", prompt, 1)
    sizes = sorted({*(n for n in _NODES if n <= budget), budget + 1})
    capacity = context + 2 * budget + depth + 8 + len(sizes) * _IN_A_ROW * (repeats + 1)
    state = target.open(batch, capacity)
    drafter.open(batch, capacity)
    roots = torch.zeros(batch, dtype=torch.long, device=target.device)
    for row in range(batch):
        drafter.admit(row, request, target.prefill(state, row, prompt, drafter.taps), roots[row])
    trees = {n: chain(roots.unsqueeze(1).repeat(1, n)) for n in sizes}
    plans = {d: Plan(d, (budget,) * batch) for d in {1, max(depth // 2, 1), depth}}
    draft = _times(target, lambda d: drafter.propose(roots, plans[d]), sorted(plans), repeats)
    verify = _times(target, lambda n: _round(target, state, trees[n]), sizes, repeats)
    return verify, draft


def _round(target: Target, state: State, trees: Tree) -> None:
    """What a round costs besides its draft: the target's pass, the walk along the trees, the transfer to the host and
    the commit, here of the roots alone."""
    forward = target.forward(state, trees, ())
    keys = torch.zeros_like(trees.tokens[:, 0])
    choices = Choices(forward.logits, keys, state.lengths_device.unsqueeze(1) + trees.depths + 1, None)
    accepted = MatchVerifier().accept(trees, forward.logits, choices)
    torch.cat([accepted.path, accepted.tokens, accepted.n_kept.unsqueeze(1)], 1).tolist()
    target.keep(state, accepted, [(0,)] * len(keys))


def _times(target: Target, call: Callable[[int], object], keys: Sequence[int], repeats: int) -> dict[int, float]:
    """Seconds of `call(key)` on an undisturbed machine; never falling with the key.

    That is their first decile: other work on the machine only ever adds, and to the median of a few calls it adds more
    than a level or a node costs. Calls of a kind follow one another, as they do while decoding: a small pass behind a
    large one finds cold caches and takes up to a third longer. The kinds take turns, so that drift hits all alike.
    """
    taken: dict[int, list[float]] = {key: [] for key in keys}
    for repeat in range(repeats + 1):
        for key in keys:
            for number in range(_IN_A_ROW):
                _settle(target)
                start = time.perf_counter()
                call(key)
                _settle(target)
                if repeat and number:  # the first round of all is a warm-up
                    taken[key].append(time.perf_counter() - start)
    quiet = [sorted(taken[key])[len(taken[key]) // 10] for key in keys]
    # More nodes or levels are never cheaper; a table that says so has measured noise, and a policy would chase it.
    return dict(zip(keys, accumulate(quiet, max)))


def _settle(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize(target.device)


def table_path(folder: Path, target: Target, key: str = "") -> Path:
    """Where the table of this hardware is kept: `folder/<hardware>[-<key>].json`.

    Args:
        key: what else the seconds depend on and the folder does not say, as the width of a draft.
    """
    return folder / f"{'-'.join(filter(None, (hardware(target), key)))}.json"


def load_or_measure(
    folder: Path, target: Target, drafter: Drafter, max_batch: int, depth: int, budget: int, key: str = ""
) -> CostTable:
    """The cost table of this hardware from `table_path`; measured and stored when that one will not do."""
    path = table_path(folder, target, key)
    with contextlib.suppress(FileNotFoundError, ValueError):
        table = CostTable.load(path)
        if max(table.verify_s) >= max_batch and max(table.draft_s[1]) >= depth and max(table.verify_s[1]) > budget:
            return table
    table = measure(target, drafter, max_batch, depth, budget)
    table.save(path)
    return table
