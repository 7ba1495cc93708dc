"""Labels of a round: what its next tokens owe to the image, by the target's attention and by counterfactual dependence.

Invariant: a label is of the tokens that a rollout emitted, from the target alone; which drafter, policy or batch made
the rounds does not change it. The state of the last token is in none: it chose no token that was emitted.

With n tokens committed, the state f_{n-1} has chosen the root x_n, and what is to be drafted is x_{n+1}, x_{n+2}, ..: a
label is over the `WINDOW` positions n, n+1, .. whose states choose these. Beside it stands that of position n-1, which
chose the root: the benchmark's own signal, one token early.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmspec.dependence import compare
from mmspec.metrics import rank_correlation
from mmspec.types import Features, Prompt, Target

WINDOW = 4
"""Positions that a label is over: the states that choose the next four tokens."""


def mass_layers(n_layers: int, n_mass: int) -> tuple[int, ...]:
    """The decoder layers whose visual attention is distilled: evenly spread, the last one included."""
    return tuple((index + 1) * n_layers // n_mass - 1 for index in range(n_mass))


def ahead(values: Tensor, n_committed: Tensor) -> tuple[Tensor, Tensor]:
    """What the next tokens have on average.

    Args:
        values: [T, S] by position, of the state there.
        n_committed: [R] n; the round's input is f_{n-1}, its root stands at position n.

    Returns:
        [R, S] mean over positions n..min(n + 3, T - 1), and [R] bool: there is such a position.
    """
    T = values.shape[0]
    places = n_committed.unsqueeze(1) + torch.arange(WINDOW)
    inside = places < T
    picked = values[places.clamp_max(T - 1)] * inside.unsqueeze(-1)
    return picked.sum(1) / inside.sum(1).clamp_min(1).unsqueeze(-1), inside.any(1)


class Labels:
    """Makes the labels of a rollout's rounds.

    Args:
        target: frozen.
        layers: whose visual attention is wanted; none: no label of it.
        counterfactual: one of COUNTERFACTUALS, or none: no label of dependence.
        instead: the mean image feature, where it stands for images.
    """

    def __init__(self, target: Target, layers: Sequence[int], counterfactual: str, instead: Tensor | None) -> None:
        self.target, self.layers, self.instead = target, tuple(layers), instead
        self.way = counterfactual
        self.depends = counterfactual != "none"

    def begin(self, rounds: dict[str, Tensor]) -> None:
        """Adds the columns, without a label yet: visual_mass and visual_mass_now [R, S], dependence, dependence_now
        and changed [R], and [R] bool visual_mass_valid and dependence_valid."""
        R = len(rounds["accepted"])
        if self.layers:
            rounds["visual_mass"] = torch.zeros(R, len(self.layers))
            rounds["visual_mass_now"] = torch.zeros(R, len(self.layers))
            rounds["visual_mass_valid"] = torch.zeros(R, dtype=torch.bool)
        if self.depends:
            rounds |= {name: torch.zeros(R) for name in ("dependence", "dependence_now", "changed")}
            rounds["dependence_valid"] = torch.zeros(R, dtype=torch.bool)

    def fill(
        self, rounds: Mapping[str, Tensor], rows: Tensor, whole: Prompt, n_prompt: int, blurred: Prompt | None = None
    ) -> None:
        """Labels the rounds of one request; a request without an image has none.

        Args:
            rounds: with the columns of `begin`.
            rows: numbers of its rounds.
            whole: its prompt, continued by what was emitted.
            n_prompt: tokens of the prompt.
            blurred: `whole` with blurred images, where these are the counterfactual; None: no label of dependence then.
        """
        if not len(rows) or not bool(whole.visual.any()):
            return
        marks = torch.zeros(len(whole), dtype=torch.long)
        marks[n_prompt:] = 1
        n = rounds["n_committed"][rows]
        seen = self.target.teacher([whole], [marks], mass_layers=self.layers)
        if seen.visual_mass is not None:
            # Without the last state, as below.
            mass = seen.visual_mass[0, :-1].cpu()
            rounds["visual_mass"][rows], rounds["visual_mass_valid"][rows] = ahead(mass, n)
            rounds["visual_mass_now"][rows] = mass[n - 1]
        if self.depends and (blurred is not None or self.way != "blur"):
            other, hidden = blurred if blurred is not None else whole, self.way == "knockout"
            unseen = self.target.teacher([other], [marks], instead=self.instead, hidden=hidden)
            self._depend(rounds, rows, n, seen, unseen)

    def _depend(self, rounds: Mapping[str, Tensor], rows: Tensor, n: Tensor, seen: Features, unseen: Features) -> None:
        # The last token was emitted, but chose none: what would follow a stop token means nothing.
        first = int(n.min()) - 1
        found = compare(seen.last_hidden[0, first:-1], unseen.last_hidden[0, first:-1], self.target.unembed)
        kl, changed = found.kl.cpu(), found.changed.float().cpu()
        both, valid = ahead(torch.stack([kl, changed], 1), n - first)
        rounds["dependence"][rows], rounds["dependence_valid"][rows] = both[:, 0], valid
        rounds["changed"][rows] = (both[:, 1] > 0).float()
        rounds["dependence_now"][rows] = kl[n - 1 - first]


def agreement(rounds: Mapping[str, Tensor]) -> dict[str, float]:
    """How far attention tells dependence: their rank correlation over the rounds that have both, by distilled layer;
    empty where labels are missing."""
    if "visual_mass" not in rounds or "dependence" not in rounds:
        return {}
    both = rounds["visual_mass_valid"] & rounds["dependence_valid"]
    mass, dependence = rounds["visual_mass"][both], rounds["dependence"][both]
    return {f"rank_correlation_{k}": rank_correlation(mass[:, k], dependence) for k in range(mass.shape[1])}
