"""The draft that pays best whatever comes next, and whether foreseeing each round is worth more than that.

Invariant: decisions follow from the cost table, from what came of drafts, and from held-out rounds that the controller
brings along; never from the clock.

A controller that foresees badly is worse than none: it ends drafts that would have been accepted, and it takes time. So
it has to show its worth before it is asked: on rounds it was not trained on, at the costs of this machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmspec.types import Trials

NEVER = 1e-3
"""Chance of what is thought impossible."""


class UsualDepth:
    """One depth for every round: the best by how far drafts of late have come.

    Args:
        prior: mean chance that at least k tokens are accepted, k = 1..Dmax, to start from.
    """

    _PRIOR = 25.0
    """Drafts that the start counts for: text is often of another kind than the rounds that it comes from."""
    _FADE = 0.98
    """Good and bad rounds come in runs: what was accepted some hundred drafts ago says little."""
    _RETURN = 0.005
    """Of the way back to the start that a level goes with each draft that did not have it: so it is tried again."""
    _EVERY = 4
    """Drafts after which depths are compared anew."""

    def __init__(self, prior: Sequence[float]) -> None:
        before = [1.0, *prior[:-1]]
        self.tried = [self._PRIOR * chance for chance in before]
        """Fading counts of levels whose outcome was seen, and of those that were accepted."""
        self.passed = [self._PRIOR * chance for chance in prior]
        self._start = list(zip(self.tried, self.passed))
        self.share = 1.0
        """Of the rows that drafts were asked for, those for which there was any: a text may have nothing to copy."""
        self.cost_s: Sequence[float] = ()
        self.news = self.depth = self.drafting = 0

    def price(self, cost_s: Sequence[float]) -> None:
        """Go by these seconds of a round by depth, 0..Dmax, from now on."""
        self.cost_s = cost_s
        self.compare()

    def learn(self, accepted: int, reach: int) -> None:
        """Take in a row's draft: levels accepted, and levels there were; 0 where the drafter had nothing to offer."""
        self.share += (1 - self._FADE) * ((reach > 0) - self.share)
        if not reach:
            return
        observed = min(accepted + 1, reach, len(self.tried))
        for level in range(observed):
            self.tried[level] = self._FADE * self.tried[level] + 1.0
            self.passed[level] = self._FADE * self.passed[level] + (level < accepted)
        for level in range(reach, len(self.tried)):
            tried, passed = self._start[level]
            self.tried[level] += self._RETURN * (tried - self.tried[level])
            self.passed[level] += self._RETURN * (passed - self.passed[level])
        self.news += 1
        if self.news >= self._EVERY:
            self.compare()

    def chances(self) -> list[float]:
        """[Dmax] of each level once the one before is accepted, as far as drafts of late say; none is quite sure."""
        pairs = zip(self.passed, self.tried)
        return [min(max(passed / max(tried, 1e-9), NEVER), 1 - NEVER) for passed, tried in pairs]

    def compare(self) -> None:
        """Choose the depth anew, 0 being none, and the best one that drafts at all."""
        self.news, chance, tokens, rates = 0, 1.0, 1.0, [1.0 / self.cost_s[0]]
        for passed, tried, seconds in zip(self.passed, self.tried, self.cost_s[1:]):
            chance *= passed / max(tried, 1e-9)
            tokens += self.share * chance
            rates.append(tokens / seconds)
        self.drafting = max(range(1, len(rates)), key=rates.__getitem__)
        self.depth = self.drafting if rates[self.drafting] > rates[0] else 0


def expected_seconds(trials: Trials | None, cost_s: Sequence[float], rows: int = 1, share: float = 1.0) -> list[float]:
    """Seconds of a round by planned depth, where the drafter often has less to offer (a copy that ends) or nothing.

    Args:
        trials: rounds in which it had something; None: what is planned is what there is.
        cost_s: seconds by depth, 0..Dmax.
        rows: of the batch, all of which are computed as deep as the deepest of them.
        share: of the rows for which there is anything.
    """
    deepest = len(cost_s) - 1
    reach = np.array([deepest]) if trials is None else np.minimum(trials.reach, deepest)
    shallower = np.bincount(reach, minlength=deepest + 1).cumsum() / len(reach)
    of_deepest = np.diff((1 - share + share * shallower) ** rows, prepend=0.0)
    seconds: list[float] = (of_deepest @ _seconds(cost_s, np.arange(deepest + 1))).tolist()
    return seconds


def _seconds(cost_s: Sequence[float], reach: np.ndarray) -> np.ndarray:
    """[T, 1 + Dmax] of rounds that reach so deep at most, by planned depth."""
    out: np.ndarray = np.asarray(cost_s)[np.minimum(np.arange(len(cost_s)), reach[:, None])]
    return out


def advantage(trials: Trials, cost_s: Sequence[float], rows: int, share: float = 1.0) -> tuple[float, float]:
    """What asking the controller would have gained over the best single depth, as a share of the tokens.

    Args:
        trials: held-out rounds.
        cost_s: seconds of a round by depth, 0..Dmax.
        rows: drafts that share a depth; held-out rounds are put together at random.
        share: of the rows for which the drafter has anything, which nobody foresees; the others are left out at random.

    Returns:
        The mean, and its standard error, rounds of one image being one observation: infinite where there is one image.
    """
    n, order = len(trials.accepted), np.random.default_rng(0)
    groups = np.arange(n)[:, None] if rows == 1 else np.stack([order.permutation(n) for _ in range(rows)], 1)
    depths, each = np.arange(len(cost_s)), np.arange(n)
    there = order.random(groups.shape) < share
    foreseen = share * np.pad(trials.chances.cumprod(1).cumsum(1), ((0, 0), (1, 0)))[:, : len(cost_s)][groups].sum(1)
    got = rows + (np.minimum(trials.accepted[:, None], depths)[groups] * there[..., None]).sum(1)
    spent = _seconds(cost_s, (trials.reach[groups] * there).max(1))
    planned = np.array(expected_seconds(trials, cost_s, rows, share))
    rates = got.sum(0) / spent.sum(0)
    usual = int(rates.argmax())
    price = float(rates[usual])
    for _ in range(20):  # Dinkelbach's fixed point
        chosen = (foreseen - price * planned).argmax(1)
        price = float(got[each, chosen].sum() / spent[each, chosen].sum())
    gains = got[each, chosen] - got[:, usual] - rates[usual] * (spent[each, chosen] - spent[:, usual])
    scale, beyond = float(got[:, usual].mean()), gains - gains.mean()
    # Each round is in `rows` groups, and what these gained beyond the mean is its own doing and that of strangers.
    own = np.bincount(groups.ravel(), np.repeat(beyond, rows), n)
    of_image = np.bincount(np.unique(trials.image, return_inverse=True)[1], own)
    if len(of_image) < 2:
        return float(gains.mean()) / scale, math.inf
    strangers = (rows - 1) * (beyond**2).sum()
    variance = max(len(of_image) / (len(of_image) - 1) * (of_image**2).sum() - strangers, 0.0)
    return float(gains.mean()) / scale, float(variance**0.5) / n / scale
