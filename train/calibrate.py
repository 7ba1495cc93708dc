"""What is kept of a controller's training: the step that foresees held-out rounds best, as sure of itself as it may be.

Invariant: images are dealt into three parts. One trains; one chooses the step and the scales; the third chooses
nothing, so what the controller brings along of it (`Head.remember`), and its calibration there, hold for other text.

A rollout of a few thousand rounds is known by heart after some tens of steps; from there on held-out rounds are
foreseen worse than by the mean of all rounds, and a policy that trusts such chances loses to a fixed draft.

Ways of sampling are calibrated apart. The Platt maps of the depths are drawn towards one another, as a few hundred
held-out rounds do not carry twenty numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mmspec import checkpoint, metrics
from mmspec.heads.viskip import sampled_rounds

VALIDATION = "viskip/val_survival_nll"
SPREAD, LOOSE = 0.2, 2.0
"""By how much scale and offset of a depth are thought to differ from what all depths have in common, in logits, and the
common scale from 1."""
ENOUGH = 64
"""Rounds of one way of sampling that its own map takes."""


class Best:
    """The weights of the best step so far, in a file, so that an interruption forgets nothing.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.step, self.nll = path, -1, float("inf")

    def forget(self, after: int) -> None:
        """Go on from the file; what was offered after step `after` never happened."""
        if self.path.is_file():
            with safe_open(str(self.path), framework="pt") as file:
                said = file.metadata()
            if after and int(said["step"]) <= after:
                self.step, self.nll = int(said["step"]), float(said["nll"])
            else:
                self.path.unlink()

    def offer(self, step: int, nll: float, weights: Mapping[str, Tensor]) -> None:
        """Keep the weights where held-out rounds are foreseen better; without such rounds, the latest."""
        if self.step < 0 or nll < self.nll or nll == float("inf"):
            self.step, self.nll = step, nll
            checkpoint.write_tensors(self.path, weights, {"step": str(step), "nll": repr(nll)})

    def weights(self) -> dict[str, Tensor]:
        """What was kept."""
        return load_file(str(self.path))


@torch.enable_grad()
def calibrate(controller: nn.Module, choosing: Mapping[str, Tensor]) -> list[float]:
    """Make the controller's logits mean chances, by what held-out rounds say of them.

    Args:
        controller: `viskip.Head`.
        choosing: rounds as `viskip.Head.forward` takes them; none leaves everything as it is.

    Returns:
        The mean scales of greedy and of sampled rounds; 0: nothing but the mean round was learned. A way of sampling
        with less than `ENOUGH` rounds has the map of all.
    """
    head: Any = controller
    accepted, reach, sampled = choosing["accepted"], choosing["reach"], sampled_rounds(choosing)
    if not len(accepted):
        return [1.0, 1.0]
    depth = torch.arange(1, head.config.depth + 1, device=accepted.device)
    observed = ((depth <= reach.unsqueeze(1)) & (depth <= accepted.unsqueeze(1) + 1)).double()
    outcome, mean = (depth <= accepted.unsqueeze(1)).double(), head.mean_round().double()
    look = head.look(*(choosing[name] for name in ("last_hidden", "root_embed", "scalars")))
    beyond = look.hazard.detach().double() - mean
    for bucket in (0, 1):
        mine = sampled == bool(bucket)
        rows = mine if int(mine.sum()) >= ENOUGH else torch.ones_like(mine)
        start = mean + head.shift[bucket].double()
        scale, offset = _platt(beyond[rows], outcome[rows], observed[rows], start)
        head.scale[bucket], head.offset[bucket] = scale, offset - scale * mean
    found: list[float] = head.scale.mean(1).tolist()
    return found


def _platt(beyond: Tensor, outcome: Tensor, observed: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest scales [Dmax] and offsets [Dmax] of logits, given that depths are much alike.

    Args:
        beyond: [R, Dmax] logits beyond the mean round's; outcome, observed: [R, Dmax] 0 or 1.
        start: [Dmax], offsets where nothing was observed.
    """
    common = torch.ones(1, dtype=torch.float64, device=beyond.device, requires_grad=True)
    own = torch.zeros(2, beyond.shape[1], dtype=torch.float64, device=beyond.device, requires_grad=True)
    solver = torch.optim.LBFGS([common, own], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        said = (common + own[0]) * beyond + start + own[1]
        nll = F.binary_cross_entropy_with_logits(said, outcome, observed, reduction="sum")
        value = nll + (own / SPREAD).square().sum() / 2 + ((common - 1) / LOOSE).square().sum() / 2
        value.backward()
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    # Below 0 it would take the controller at the contrary of its word.
    return (common + own[0]).detach().clamp_min(0.0), (start + own[1]).detach()


@torch.no_grad()
def remember(controller: nn.Module, judging: Mapping[str, Tensor]) -> None:
    """Let a calibrated controller bring along how it does on rounds that chose nothing of it."""
    head: Any = controller
    whole = {name: table[~judging["explored"]] for name, table in judging.items()}  # of others more might have come
    if len(whole["accepted"]):
        ends = whole["accepted"], whole["reach"]
        head.remember(head.chances(whole), *ends, sampled_rounds(whole), whole["image"])


@torch.no_grad()
def reliability(controller: nn.Module, held_out: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How far its chances are from what came of held-out rounds, by temperature: rounds, and by depth the observed
    levels n, the expected calibration error and the Brier score (`metrics.calibration`).

    Args:
        controller: `viskip.Head`, calibrated.
        held_out: rounds that chose nothing of it, as `viskip.Head.forward` takes them, with temperature [R].
    """
    head: Any = controller
    found = []
    for temperature in sorted(set(held_out["temperature"].tolist())):
        rows = held_out["temperature"] == temperature
        mine = {name: table[rows] for name, table in held_out.items()}
        ends = zip(mine["accepted"].tolist(), mine["reach"].tolist())
        said = zip(head.chances(mine).tolist(), ends)
        outcomes = [(row[: min(accepted + 1, reach)], accepted) for row, (accepted, reach) in said]
        by_depth = [{k: v for k, v in depth.items() if k != "bins"} for depth in metrics.calibration(outcomes)]
        found.append({"temperature": temperature, "rounds": len(outcomes), "by_depth": by_depth})
    return found


def flat_reliability(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`reliability` as figures to log."""
    return {
        f"viskip/val_{figure}_t{bucket['temperature']:g}_{depth['depth']}": depth[figure]
        for bucket in found
        for depth in bucket["by_depth"]
        for figure in ("ece", "brier")
    }
