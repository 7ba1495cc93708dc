"""Whether an exported folder drafts what the head drafts: its files read back in several ways, logits compared in fp32.

The ways share no code with the writer: a plain computation from the files (`plain.py`), and the converter, which makes
a head of this project of them again. `scripts/export.py` adds the `speculators` package where it is installed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmspec import convert
from mmspec.checkpoint import Checkpoint
from mmspec.export import plain
from mmspec.export.plain import Sample
from mmspec.heads.medusa import Head as MedusaHead
from mmspec.nn import attend
from mmspec.types import Target

TOLERANCE = 1e-4
"""Of fp32 logits, absolute where the largest is below 1, relative to it above."""
T, S = 24, 2
"""Pairs of the prefix, and tokens drafted behind it."""
CONVERTED = {"sglang": "eagle3", "speculators": "eagle3_speculators", "vllm-medusa": "medusa_vllm"}
"""{format: layout of the converter}."""


class Mismatch(RuntimeError):
    """The folder drafts something else than the head: a defect of the exporter, not of its input."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        way: how the folder was read.
        error: largest difference of two logits.
        scale: the largest logit.
    """

    way: str
    error: float
    scale: float

    def __str__(self) -> str:
        return f"{self.way}: draft logits differ by at most {self.error:.1e} (largest logit {self.scale:.1f}, fp32)"

    def require(self) -> None:
        """
        Raises:
            Mismatch: the difference is more than rounding.
        """
        if not self.error <= TOLERANCE * max(1.0, self.scale):
            raise Mismatch(f"verification failed, nothing was written: {self}")


def verify(folder: Path, made: Checkpoint, format: str, target: Target, dtype: torch.dtype) -> list[Check]:
    """Compares an exported folder with the head.

    Args:
        folder: of the export.
        made: the run.
        format: a key of ENGINES.
        target: the run's.
        dtype: of the weights in the folder, to which the head's are rounded before they are compared.

    Returns:
        One entry a way, all within the tolerance.

    Raises:
        Mismatch: one is not.
    """
    head: Any = made.head().to(dtype).float()
    sample, unembedding = make_sample(made, target, dtype), _unembedding(target, dtype)
    ours = head_logits(head, sample, unembedding)
    checks = [compared("computed from its files", ours, plain_logits(folder, sample, made))]
    with tempfile.TemporaryDirectory() as there:
        back = convert.convert(folder, CONVERTED[format], target, there, image_input=made.config.image_input)
        again: Any = back.head()
        checks.append(compared("converted back", ours, head_logits(again, sample, unembedding)))
    for check in checks:
        check.require()
    return checks


def make_sample(made: Checkpoint, target: Target, dtype: torch.dtype, seed: int = 0) -> Sample:
    """Random states and tokens of a target, whose embeddings are rounded to the file's dtype."""
    rng = torch.Generator().manual_seed(seed)
    shape, n = made.target.shape, T + S
    hidden = {i: torch.randn(n, shape.hidden_size, generator=rng) for i in (*range(shape.n_layers), -1)}
    ids = torch.randint(0, shape.vocab_size, (n,), generator=rng)
    axes = torch.arange(n).expand(3, n).clone()
    if getattr(made.config, "rope", "1d") == "mrope":  # positions of an image in the middle of the prefix
        axes[:, T // 4 : T // 2] = torch.randint(0, T, (3, T // 2 - T // 4), generator=rng)
    return Sample(hidden, ids, target.embed(ids.to(target.device)).to(dtype).float().cpu(), axes, S)


def _unembedding(target: Target, dtype: torch.dtype) -> Tensor:
    units = torch.eye(target.shape.hidden_size, dtype=target.dtype, device=target.device)
    return target.unembed(units).to(dtype).float().cpu()


def plain_logits(folder: Path, sample: Sample, made: Checkpoint) -> Tensor:
    """Of the folder's files, see `plain`."""
    files = plain.read(folder)
    if made.kind == "medusa":
        return plain.medusa_logits(files, sample)
    return plain.eagle3_logits(files, sample, made.target.shape.n_layers)


@torch.no_grad()
def head_logits(head: Any, sample: Sample, unembedding: Tensor) -> Tensor:
    """The same of a head of this project (fp32, CPU), by the modules that it trains and drafts with.

    Args:
        unembedding: [D, V], the target's.
    """

    def unembed(x: Tensor) -> Tensor:
        return x @ unembedding

    if isinstance(head, MedusaHead):
        logits: Tensor = head.logits(head.ahead(sample.hidden[-1]), unembed)
        return logits.transpose(0, 1)
    n, past = len(sample.ids) - sample.n_steps, []

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past.append((k, v))
        keys, values = (torch.cat(parts, 2) for parts in zip(*past))
        return attend(q, keys, values, causal=len(past) == 1)

    states = head.enter(torch.cat([sample.hidden[tap][:n] for tap in head.taps], -1))
    outputs = []
    for step in range(sample.n_steps + 1):
        at = slice(0, n) if step == 0 else slice(n - 1 + step, n + step)
        axes = sample.axes[:, :n] if step == 0 else sample.axes[:, n - 1 : n] + step
        rope = head.rotary.along(axes, int(sample.axes.max()) + sample.n_steps + 1, torch.float32)
        states = head.block(head.pair(sample.embeds[at], states).unsqueeze(0), rope, attention)[0]
        outputs.append(head.logits(states, unembed))
        states = states[-1:]
    return spread(torch.cat(outputs), head.draft_ids, head.config.vocab_size)


def spread(logits: Tensor, ids: Tensor | None, vocab_size: int) -> Tensor:
    """Logits [.., V'] over the target's vocabulary [.., V], -inf where the head has no token."""
    if ids is None:
        return logits
    return torch.full((*logits.shape[:-1], vocab_size), -torch.inf).index_copy(-1, ids, logits)


def compared(way: str, ours: Tensor, theirs: Tensor) -> Check:
    """Two sets of logits of one shape."""
    if ours.shape != theirs.shape or not torch.equal(ours.isinf(), theirs.isinf()):
        return Check(way, float("inf"), float("nan"))
    inside = ~ours.isinf()
    return Check(way, float((ours - theirs)[inside].abs().max()), float(ours[inside].abs().max()))
