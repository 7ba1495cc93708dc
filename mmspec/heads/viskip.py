"""The ViSkip controller: how far will the target agree with the next draft? Asked before anything is drafted.

A trunk over the target's last hidden state, the root's embedding and free scalars; visual heads that estimate what the
next tokens owe to the image (distilled from the target, so that neither an attention map nor a second pass is needed at
run time); a survival head for the paired drafter, which reads them. MMSpec's ViSkip (arXiv 2603.14989) is a fixed
threshold on attention mass, read after the draft was paid for; this one is trained, and asked before.

Attention is what it is, not freed of sinks. Why so: DESIGN 102 to 105 and 121.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmspec.nn import RMSNorm
from mmspec.types import COUNTERFACTUALS, Calibration, Objective, TargetShape, Trials

EPS = 1e-6
NO_COUNTERFACTUAL = "none"
_SURE = 1e-3, 1 - 1e-3
"""Between which a mean chance becomes a logit."""
N_TRIALS = 2048
"""Held-out rounds that a controller brings along; fewer leave the rest of the table empty (accepted -1)."""
_PRIOR_ROUNDS = 50
"""Rounds that the mean over both ways of sampling counts for in the mean of one."""
_CHUNK = 8192
"""Tokens whose embeddings are projected at a time."""


@dataclass(frozen=True)
class Config:
    """Shape and loss weights; 0 means "as the target".

    Args:
        hidden_size: D of the target.
        n_scalars: K, the free scalars.
        width: of the trunk.
        depth: Dmax, the deepest draft it is asked about.
        n_mass: S, decoder layers whose visual attention is distilled; 0: no such head.
        mass_weight: of the visual attention term.
        counterfactual: without which image dependence is measured: mean, blur or knockout (`mmspec/dependence.py`);
            none: no such heads, and no second pass of the target over the rollout.
        dependence_weight: of the term of how much the next tokens depend on the image.
        changed_weight: of the term of whether one of them would be another one without.
        detach: survival alone does not shape the visual heads: they learn from their labels only.
        reads: "all", or "scalars" without state and embedding.
    """

    hidden_size: int = 0
    n_scalars: int = 14
    width: int = 256
    depth: int = 8
    n_mass: int = 2
    mass_weight: float = 0.3
    counterfactual: str = NO_COUNTERFACTUAL
    dependence_weight: float = 0.3
    changed_weight: float = 0.1
    detach: bool = False
    reads: str = "all"

    def __post_init__(self) -> None:
        if self.counterfactual not in (NO_COUNTERFACTUAL, *COUNTERFACTUALS):
            raise ValueError(
                f"viskip: counterfactual must be none or one of {', '.join(COUNTERFACTUALS)}, got "
                f"{self.counterfactual!r}"
            )
        if self.reads not in ("all", "scalars"):
            raise ValueError(f"viskip: reads must be all or scalars, got {self.reads!r}")

    @property
    def depends(self) -> bool:
        """Whether it has heads of counterfactual dependence."""
        return self.counterfactual != NO_COUNTERFACTUAL

    def resolve(self, shape: TargetShape) -> Config:
        return replace(self, hidden_size=self.hidden_size or shape.hidden_size)


@dataclass(frozen=True)
class Said:
    """What the network says of R rounds, as logits.

    Args:
        hazard: [R, Dmax], of surviving each depth once the one before is.
        mass: [R, S], of the visual attention; None without that head.
        dependence: [R, 1], before its softplus: log(1 + KL in nats); None without that head.
        changed: [R, 1], of another choice without the image; None likewise.
    """

    hazard: Tensor
    mass: Tensor | None
    dependence: Tensor | None
    changed: Tensor | None


class Head(nn.Module):
    """Survival model of a paired drafter."""

    LATER = (
        "trial_chances", "trial_accepted", "trial_reach", "trial_sampled", "trial_image", "shift", "scale", "offset",
    )  # fmt: skip
    """Controllers of before had no held-out rounds to bring along, which are asked always, did not say which images
    these are of, or had one calibration for both ways of sampling."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = c = config
        if not c.hidden_size:
            raise ValueError("viskip.Config has hidden_size 0; call config.resolve(target.shape) first")
        if c.reads == "all":
            self.norm_state = RMSNorm(c.hidden_size, EPS)
            self.norm_root = RMSNorm(c.hidden_size, EPS)
            self.from_state = nn.Linear(c.hidden_size, c.width)
            self.from_root = nn.Linear(c.hidden_size, c.width, bias=False)
        self.from_scalars = nn.Linear(c.n_scalars, c.width, bias=c.reads == "scalars")
        self.inner = nn.Linear(c.width, c.width)
        # Survival reads the first two; the third teaches the trunk, and nobody computes it when decoding.
        self.mass = nn.Linear(c.width, c.n_mass) if c.n_mass else None
        self.dependence = nn.Linear(c.width, 1) if c.depends else None
        self.changed = nn.Linear(c.width, 1) if c.depends else None
        self.hazard = nn.Linear(c.width + c.n_mass + c.depends + c.n_scalars, c.depth)
        self.register_buffer("scalar_mean", torch.zeros(c.n_scalars))
        self.register_buffer("scalar_std", torch.ones(c.n_scalars))
        self.register_buffer("prior", torch.full((c.depth,), 0.5).cumprod(0))
        self.register_buffer("trial_chances", torch.zeros(N_TRIALS, c.depth))
        self.register_buffer("trial_accepted", torch.full((N_TRIALS,), -1.0))
        self.register_buffer("trial_reach", torch.zeros(N_TRIALS))
        self.register_buffer("trial_sampled", torch.zeros(N_TRIALS))
        self.register_buffer("trial_image", torch.arange(float(N_TRIALS)))
        # By way of sampling, greedy first. `shift`: the mean round there, in logits beyond the mean round of all.
        self.register_buffer("shift", torch.zeros(2, c.depth))
        # `scale * logit + offset` is the logit of a calibrated chance.
        self.register_buffer("scale", torch.ones(2, c.depth))
        self.register_buffer("offset", torch.zeros(2, c.depth))
        self.trial_sampled: Tensor
        self.trial_image: Tensor
        self.shift: Tensor
        self.scale: Tensor
        self.offset: Tensor
        self.trial_chances: Tensor
        self.trial_accepted: Tensor
        self.trial_reach: Tensor
        self.scalar_mean: Tensor
        self.scalar_std: Tensor
        self.prior: Tensor

    def fit_statistics(self, rounds: Mapping[str, Tensor]) -> None:
        """Standardisation of the scalars and mean survival by depth, from the training rounds.

        Survival starts as that mean, whatever the round: what training adds is what it has learned of rounds.
        """
        table = rounds["scalars"].float()
        self.scalar_mean.copy_(table.mean(0))
        self.scalar_std.copy_(table.std(0, correction=0).clamp_min(1e-3))
        k = torch.arange(1, self.config.depth + 1)
        kept, offered = rounds["accepted"].unsqueeze(1) >= k, rounds["reach"].unsqueeze(1) >= k
        reached = rounds["accepted"].unsqueeze(1) >= k - 1
        # Conditional survival over rounds that offered depth k at all, so that shallow rounds do not bias it.
        share = (kept & offered).sum(0) / (reached & offered).sum(0).clamp_min(1)
        self.prior.copy_(share.cumprod(0))
        for bucket in (0, 1):
            mine = (sampled_rounds(rounds) == bool(bucket)).unsqueeze(1)
            passed, tried = ((what & offered & mine).sum(0) for what in (kept, reached))
            own = (passed + _PRIOR_ROUNDS * share) / (tried + _PRIOR_ROUNDS)
            self.shift[bucket] = own.clamp(*_SURE).logit() - share.clamp(*_SURE).logit()
        with torch.no_grad():
            self.hazard.weight.zero_()
            self.hazard.bias.copy_(share.clamp(*_SURE).logit())

    def mean_round(self) -> Tensor:
        """[Dmax] logits of each level once the one before is accepted, of the mean round of training."""
        before = torch.cat([torch.ones_like(self.prior[:1]), self.prior[:-1]])
        return (self.prior / before.clamp_min(1e-12)).clamp(*_SURE).logit()

    def chances(self, rounds: Mapping[str, Tensor]) -> Tensor:
        """Calibrated chances [R, Dmax] of each level once the one before is accepted; rounds as for `forward`."""
        bucket = sampled_rounds(rounds).long()
        hazard = self.look(rounds["last_hidden"], rounds["root_embed"], rounds["scalars"]).hazard
        return (self.scale[bucket] * hazard + self.offset[bucket]).sigmoid()

    def remember(self, chances: Tensor, accepted: Tensor, reach: Tensor, sampled: Tensor, image: Tensor) -> None:
        """Keep what came of held-out rounds: conditional chances [T, Dmax], accepted tokens, offered levels, whether
        tokens were drawn and of which image they are [T], the first `N_TRIALS` of them."""
        n = min(len(accepted), N_TRIALS)
        self.trial_image[:n] = image[:n].to(self.trial_image)
        self.trial_chances[:n] = chances[:n]
        self.trial_sampled[:n] = sampled[:n].to(self.trial_sampled)
        self.trial_accepted.fill_(-1.0)[:n] = accepted[:n].to(self.trial_accepted)
        self.trial_reach[:n] = reach[:n].to(self.trial_reach)

    def look(self, last_hidden: Tensor, root_embed: Tensor, scalars: Tensor) -> Said:
        """Everything it says of some rounds; arguments as for `survival`."""
        s = ((scalars - self.scalar_mean) / self.scalar_std).clamp(-5.0, 5.0)
        h = self.from_scalars(s)
        if self.config.reads == "all":
            h = h + self.from_state(self.norm_state(last_hidden)) + self.from_root(self.norm_root(root_embed))
        h = F.silu(h)
        h = h + F.silu(self.inner(h))
        mass, dependence, changed = (
            head(h) if head is not None else None for head in (self.mass, self.dependence, self.changed)
        )
        seen = [] if mass is None else [mass.sigmoid()]
        seen += [] if dependence is None else [F.softplus(dependence)]
        if self.config.detach:
            seen = [estimate.detach() for estimate in seen]
        return Said(self.hazard(torch.cat([h, *seen, s], -1)), mass, dependence, changed)

    def survival(self, last_hidden: Tensor, root_embed: Tensor, scalars: Tensor) -> Tensor:
        """P(at least k draft tokens are accepted), k = 1..Dmax, not calibrated: [R, Dmax], non-increasing.

        Args:
            last_hidden: [R, D] f_{n-1}; root_embed: [R, D] e(x_n); scalars: [R, K].
        """
        return self.look(last_hidden, root_embed, scalars).hazard.sigmoid().cumprod(1)

    def forward(self, rounds: Mapping[str, Tensor]) -> Objective:
        """Negative log-likelihood of the accepted lengths, plus the terms of the visual heads.

        Args:
            rounds: last_hidden, root_embed [R, D], scalars [R, K], accepted, reach [R], and optionally visual_mass
                [R, S] with visual_mass_valid [R], and dependence, changed, dependence_valid [R] (`train/visual.py`). A
                round with accepted == reach is censored: no failure was seen.
        """
        said = self.look(rounds["last_hidden"], rounds["root_embed"], rounds["scalars"])
        logits = said.hazard
        accepted, reach = rounds["accepted"].unsqueeze(1), rounds["reach"].unsqueeze(1)
        k = torch.arange(1, self.config.depth + 1, device=logits.device)
        observed = (k <= reach) & (k <= accepted + 1)
        outcome = (k <= accepted).float()
        loss = F.binary_cross_entropy_with_logits(logits, outcome, weight=observed.float(), reduction="sum")
        count = torch.tensor(len(logits), device=logits.device)
        with torch.no_grad():
            q = logits.sigmoid().cumprod(1)[:, 0]
            sums = {
                "survival_nll": loss.detach(),
                "brier_1": (q - outcome[:, 0]).square().sum(),
                "a0_predicted": (1 - q).sum(),
                "a0_observed": (1 - outcome[:, 0]).sum(),
            }
        counts = dict.fromkeys(sums, count.float())
        for name, term, weight, valid in self._visual_terms(said, rounds):
            loss = loss + weight * (term * valid).sum()
            sums[name], counts[name] = (term * valid).sum().detach(), valid.sum()
        sums["loss"], counts["loss"] = loss.detach(), count.float()
        return Objective(loss, count, sums, counts)

    def _visual_terms(self, said: Said, rounds: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, float, Tensor]]:
        """Name, value [R], weight and [R] 0 or 1 where there is a label, of each visual head that has labels."""
        c = self.config
        if said.mass is not None and "visual_mass" in rounds:
            label, valid = rounds["visual_mass"].clamp(0, 1), rounds["visual_mass_valid"].float()
            term = F.binary_cross_entropy_with_logits(said.mass, label, reduction="none").mean(1)
            yield "mass_bce", term, c.mass_weight, valid
            yield "mass_mae", (said.mass.detach().sigmoid() - label).abs().mean(1), 0.0, valid
        if said.dependence is not None and said.changed is not None and "dependence" in rounds:
            valid = rounds["dependence_valid"].float()
            estimate, label = F.softplus(said.dependence).squeeze(1), rounds["dependence"].log1p()
            yield "dependence_huber", F.huber_loss(estimate, label, reduction="none"), c.dependence_weight, valid
            changed = rounds["changed"].float()
            term = F.binary_cross_entropy_with_logits(said.changed.squeeze(1), changed, reduction="none")
            yield "changed_bce", term, c.changed_weight, valid


class Deployed:
    """A trained controller to decode with.

    Its network is a few vectors of a few hundred numbers: on the device each of its thirty operations would cost a
    launch. So the device makes one projection of the state and its length, which ride on the step's one transfer, and
    the rest is done on the host. What the root contributes is looked up there, in a table of all tokens. A NumPy call
    costs ten microseconds when all else has passed through the caches since the last one: so there are three products,
    and what is about a dozen numbers is Python's. `silu` is `x / 2 + x / 2 tanh(x / 2)`, whose halves are in the
    matrices.

    Args:
        head: trained, in eval mode, on the target's device.
        embed: the target's token embedding.
        vocab_size: of the target.
    """

    @torch.no_grad()
    def __init__(self, head: Head, embed: Callable[[Tensor], Tensor], vocab_size: int) -> None:
        prior = (head.mean_round() + head.shift).sigmoid().cumprod(1).tolist()
        self._at = [
            Calibration(prior[k], _array(head.scale[k]), _array(head.offset[k]), _trials(head, k)) for k in (0, 1)
        ]
        self.standard = list(zip((1 / head.scalar_std).tolist(), (-head.scalar_mean / head.scalar_std).tolist()))
        c = head.config
        by_trunk, by_visual, by_scalars = head.hazard.weight.split((c.width, c.n_mass + c.depends, c.n_scalars), 1)
        visual = [layer for layer in (head.mass, head.dependence) if layer is not None]  # `changed` is not read
        self.width, self.n_mass, self.n_visual = c.width, c.n_mass, c.n_mass + c.depends
        self.first = _matrix(0.5 * head.from_scalars.weight, by_scalars)
        """[K, width + Dmax]: what the scalars contribute to the trunk, and straight to the logits."""
        self.inner = _matrix(0.5 * head.inner.weight), 0.5 * _array(head.inner.bias)
        self.last = _matrix(*(layer.weight for layer in visual), by_trunk)
        """[width, visual + Dmax]: the visual heads, and what the trunk contributes to the logits."""
        self.last_bias = torch.cat([*(layer.bias for layer in visual), head.hazard.bias]).tolist()
        self.by_visual = by_visual.T.tolist()
        self.reads_context = c.reads == "all"
        if self.reads_context:
            self.hidden_size = c.hidden_size
            # The norm's gain goes into the matrix.
            self.state_weight = 0.5 * (head.from_state.weight * head.norm_state.weight).float()
            tokens = torch.arange(vocab_size, device=head.prior.device)
            by_root = (head.from_root(head.norm_root(embed(some).float())) for some in tokens.split(_CHUNK))
            rows = [0.5 * _array(row + head.from_state.bias) for row in by_root]
        self.bias = np.concatenate(rows) if self.reads_context else 0.5 * _array(head.from_scalars.bias)
        """[width], or [V, width] by root: everything in the first sum that neither state nor scalars have a say in."""

    def at(self, sampled: bool) -> Calibration:
        """What its logits mean where tokens are drawn, or the best ones are taken."""
        return self._at[sampled]

    def look(self, last_hidden: Tensor, roots: Tensor) -> list[Tensor]:
        """What `logits` has to be told of the state and the root, as columns: half the trunk's projection of the state
        [R, width], the state's length [R, 1], the root [R, 1]; none where it reads scalars alone.

        Args:
            last_hidden: [R, D]; roots: [R] int64.
        """
        if not self.reads_context:
            return []
        state = last_hidden.float()
        # A sum of squares would be the same to the host, and overflow for states the length of which does not.
        length = torch.linalg.vector_norm(state, dim=1, keepdim=True)
        return [F.linear(state, self.state_weight), length, roots.unsqueeze(1)]

    def logits(self, seen: Sequence[Sequence[float]], scalars: Sequence[Sequence[float]]) -> list[list[float]]:
        """Conditional survival logits, [R, Dmax], not calibrated.

        Args:
            seen: [R, width + 2], what came of `look`'s columns, or [R, 0].
            scalars: [R, K].
        """
        clamped = [[min(max(a * x + b, -5.0), 5.0) for x, (a, b) in zip(row, self.standard)] for row in scalars]
        first = np.array(clamped, np.float32) @ self.first
        h = first[:, : self.width]
        if self.reads_context:
            per_rms = [[(row[-2] ** 2 / self.hidden_size + EPS) ** -0.5] for row in seen]
            h += np.array(seen, np.float32)[:, :-2] * np.array(per_rms, np.float32)
            h += self.bias.take([int(row[-1]) for row in seen], 0)
        else:
            h += self.bias
        h = _silu_of_twice(h)
        inner = h @ self.inner[0]
        inner += self.inner[1]
        h += _silu_of_twice(inner)
        last, straight = (h @ self.last).tolist(), first[:, self.width :].tolist()
        return [self._hazard(row, more) for row, more in zip(last, straight)]

    def _hazard(self, row: Sequence[float], straight: Sequence[float]) -> list[float]:
        """The logits of one row, from the last product and from what the scalars contribute."""
        row = [x + b for x, b in zip(row, self.last_bias)]
        out = [x + y for x, y in zip(row[self.n_visual :], straight)]
        for i, (x, weights) in enumerate(zip(row, self.by_visual)):
            # Visual attention is logistic, the dependence softplus.
            value = 0.5 + 0.5 * math.tanh(0.5 * x) if i < self.n_mass else max(x, 0.0) + math.log1p(math.exp(-abs(x)))
            out = [y + value * weight for y, weight in zip(out, weights)]
        return out


def sampled_rounds(rounds: Mapping[str, Tensor]) -> Tensor:
    """[R] bool: whether the tokens of each round were drawn; rounds that do not say are greedy."""
    accepted = rounds["accepted"]
    return rounds["temperature"] > 0 if "temperature" in rounds else torch.zeros_like(accepted, dtype=torch.bool)


def _trials(head: Head, sampled: int) -> Trials | None:
    """Held-out rounds of one way of sampling, or of both where it has none; None where there are none at all."""
    tried = head.trial_accepted >= 0
    mine = tried & (head.trial_sampled == sampled)
    mine = mine if bool(mine.any()) else tried
    if not bool(mine.any()):
        return None
    tables = head.trial_accepted, head.trial_reach, head.trial_image
    counts = [_array(table[mine]).astype(int) for table in tables]
    return Trials(_array(head.trial_chances[mine]), *counts)


def _array(x: Tensor) -> np.ndarray:
    out: np.ndarray = x.detach().float().cpu().numpy()
    return out


def _matrix(*weights: Tensor) -> np.ndarray:
    """Weights [out, in] of several layers with one input as one matrix to multiply by from the left."""
    return np.ascontiguousarray(_array(torch.cat(weights)).T)


def _silu_of_twice(half: np.ndarray) -> np.ndarray:
    out: np.ndarray = np.tanh(half)
    out *= half
    out += half
    return out
