"""What is kept of a controller's training: the step that foresees held-out rounds best, as sure of itself as it may be.

Invariant: no step of the optimizer sees the rounds that choose, so what the controller brings along of them
(`Head.remember`) is how it does on text it was not trained on.

A rollout of a few thousand rounds is known by heart after some tens of steps; from there on held-out rounds are
foreseen worse than by the mean of all rounds, and a policy that trusts such chances loses to a fixed draft.

Source: methods, D3 (calibration). Deviation: one scale for all depths in place of a Platt map each; a few hundred
held-out rounds do not carry more.
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

VALIDATION = "viskip/val_survival_nll"
SCALES = 11


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


@torch.no_grad()
def calibrate(controller: nn.Module, held_out: Mapping[str, Tensor]) -> float:
    """Temper the controller's logits by what held-out rounds say of them, and let it remember those.

    Args:
        controller: `viskip.Head`.
        held_out: rounds as `viskip.Head.forward` takes them; none leaves everything as it is.

    Returns:
        The scale, 0 (nothing but the mean was learned) to 1.
    """
    head: Any = controller
    accepted, reach = held_out["accepted"].unsqueeze(1), held_out["reach"].unsqueeze(1)
    if not len(accepted):
        return 1.0
    depth = torch.arange(1, head.config.depth + 1, device=accepted.device)
    observed, outcome = ((depth <= reach) & (depth <= accepted + 1)).float(), (depth <= accepted).float()
    kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    found: list[tuple[float, float]] = []
    for step in range(SCALES):
        scale = step / (SCALES - 1)
        head.load_state_dict(kept)
        head.temper(scale)
        found.append(
            (float(F.binary_cross_entropy(_chances(head, held_out), outcome, observed, reduction="sum")), scale)
        )
    scale = min(found)[1]
    head.load_state_dict(kept)
    head.temper(scale)
    head.remember(_chances(head, held_out), held_out["accepted"], held_out["reach"])
    return scale


def reliability(controller: nn.Module, held_out: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How far its chances are from what came of held-out rounds, by temperature: rounds, and by depth the observed
    levels n, the expected calibration error and the Brier score (`metrics.calibration`).

    Args:
        controller: `viskip.Head`, tempered.
        held_out: rounds as `viskip.Head.forward` takes them, with temperature [R].
    """
    found = []
    for temperature in sorted(set(held_out["temperature"].tolist())):
        rows = held_out["temperature"] == temperature
        mine = {name: table[rows] for name, table in held_out.items()}
        ends = zip(mine["accepted"].tolist(), mine["reach"].tolist())
        said = zip(_chances(controller, mine).tolist(), ends)
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


@torch.no_grad()
def _chances(head: Any, rounds: Mapping[str, Tensor]) -> Tensor:
    """[R, Dmax] of each level once the one before is accepted."""
    survival = head.survival(rounds["last_hidden"], rounds["root_embed"], rounds["scalars"])
    before = torch.cat([torch.ones_like(survival[:, :1]), survival[:, :-1]], 1)
    chances: Tensor = (survival / before.clamp_min(1e-9)).clamp(1e-6, 1 - 1e-6)
    return chances
