"""Does vision help to predict draftability? From predictions of held-out rounds to figures, tests, and a plain answer.

Invariant: every model is judged on the same rounds, each predicted by a model that saw neither it nor its image, and a
comparison draws images, not rounds. What is claimed together is held to the level of its family (Holm).

`survival_nll` is the negative log-likelihood of what came of a round's draft, in nats a round (the loss L_s of methods,
D3); `auc` is that of `a = 0`, no token accepted; `ece` and `brier` are by depth (`metrics.calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import tables
from eval.summary import OVERALL
from eval.verdicts import OPEN
from mmspec import metrics

ENOUGH = 100
"""Observed levels from which on a depth's calibration error is worth a figure."""


@dataclass(frozen=True)
class Rounds:
    """What came of R held-out rounds.

    Args:
        accepted, reach: [R] levels accepted and offered; equal ones are censored.
        topics, images: of each round; images are what is drawn together.
    """

    accepted: Tensor
    reach: Tensor
    topics: Sequence[str]
    images: Sequence[str]

    def of(self, topic: str) -> Tensor:
        """Numbers of the rounds of a topic."""
        return torch.tensor([k for k, name in enumerate(self.topics) if topic in (OVERALL, name)])

    def names(self) -> list[str]:
        return [OVERALL, *sorted(set(self.topics))]


def survival_nll(logits: Tensor, accepted: Tensor, reach: Tensor) -> Tensor:
    """Of each round, [R] float64 nats; logits [R, Dmax] of surviving each level once the one before is."""
    k = torch.arange(1, logits.shape[1] + 1)
    observed = (k <= reach.unsqueeze(1)) & (k <= accepted.unsqueeze(1) + 1)
    outcome = (k <= accepted.unsqueeze(1)).double()
    return F.binary_cross_entropy_with_logits(logits.double(), outcome, weight=observed.double(), reduction="none").sum(
        1
    )


def figures(logits: Tensor, rounds: Rounds, topic: str = OVERALL) -> dict[str, Any]:
    """How well one model predicts the rounds of a topic.

    Args:
        logits: [R, Dmax], of all rounds.
        rounds: likewise.
        topic: of those that count.
    """
    rows = rounds.of(topic)
    said, accepted, reach = logits[rows], rounds.accepted[rows], rounds.reach[rows]
    q = said.double().sigmoid()
    seen = (accepted + 1).minimum(reach).clamp_max(said.shape[1]).tolist()
    by_depth = metrics.calibration([(q[i, :n].tolist(), int(accepted[i])) for i, n in enumerate(seen)])
    enough = [d for d in by_depth if d["n"] >= ENOUGH]
    return {
        "n": len(rows), "images": len({rounds.images[k] for k in rows.tolist()}),
        "survival_nll": float(survival_nll(said, accepted, reach).mean()),
        "auc": metrics.auc(1 - q[:, 0], accepted == 0),
        "zero_nll": float(F.binary_cross_entropy(q[:, 0], (accepted > 0).double())),
        "a0": float((accepted == 0).double().mean()),
        "ece_1": by_depth[0]["ece"] if by_depth else math.nan,
        "ece_max": max((d["ece"] for d in enough), default=math.nan),
        "by_depth": [{key: d[key] for key in ("depth", "n", "ece", "brier")} for d in by_depth],
    }  # fmt: skip


def compared(
    pairs: Mapping[str, tuple[Tensor, Tensor]], rounds: Rounds, topics: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """A family of comparisons: how many nats a round the model without something needs more, by topic.

    Args:
        pairs: nats [R] of the model with it and of the one without, by what is left out.
        rounds: the rounds; topics: those to compare in.
        seed: of the bootstrap.

    Returns:
        Rows of without, topic, gain (positive: with it predicts better), lo, hi, p and p_holm.
    """
    rows: list[dict[str, Any]] = []
    for name, (first, other) in pairs.items():
        for topic in topics:
            mine = rounds.of(topic)
            images = [rounds.images[k] for k in mine.tolist()]
            gain, p = metrics.mean_difference(first[mine], other[mine], images, seed=seed)
            rows.append({"without": name, "topic": topic, "gain": gain.value, "lo": gain.lo, "hi": gain.hi, "p": p})
    for row, adjusted in zip(rows, metrics.holm([row["p"] for row in rows])):
        row["p_holm"] = adjusted
    return rows


def verdict(row: Mapping[str, Any]) -> str:
    """What one comparison says: helps, harms, no difference was found, or (of a single image) nothing."""
    if math.isnan(row["p_holm"]):
        return OPEN
    if row["p_holm"] < metrics.LEVEL and row["lo"] > 0:
        return "helps"
    if row["p_holm"] < metrics.LEVEL and row["hi"] < 0:
        return "harms"
    return "no difference found"


def answer(rows: Sequence[Mapping[str, Any]], what: str) -> list[str]:
    """Sentences, one a topic, on what a model loses without something.

    Args:
        rows: of `compared`, all of one name.
        what: is left out, in words.
    """
    said = []
    for row in rows:
        where = "Overall" if row["topic"] == OVERALL else row["topic"]
        span = (
            f"{row['gain']:+.4f} nats a round, 95% {row['lo']:+.4f} to {row['hi']:+.4f}, p {row['p_holm']:.3f} (Holm)"
        )
        said.append(f"{where}: {what}: {verdict(row)} ({span}).")
    return said


def markdown(found: Mapping[str, Any]) -> str:
    """The result as a page of tables."""
    lines = ["# Does vision help to predict draftability?", ""]
    lines += [f"`{found['command']}`, commit {found['commit']}, {found['machine']}.", "", found["how"], ""]
    lines += ["## Answer", "", *(f"- {line}" for line in found["answer"]), ""]
    lines += ["## Models, on all held-out rounds", ""]
    head = (
        "model",
        "nats a round",
        "AUC of a = 0",
        "ECE depth 1",
        "ECE, worst depth",
        "gain of the whole",
        "95%",
        "p (Holm)",
    )
    lines += [tables.markdown(head, [
        [
            row["model"], f"{row['survival_nll']:.4f}", _n(row["auc"], 3), _n(row["ece_1"], 3), _n(row["ece_max"], 3),
            *(_gain(found["ablations"], row["model"])),
        ]
        for row in found["models"] if row["topic"] == OVERALL
    ])]  # fmt: skip
    lines += ["## By topic", ""]
    names = [row["model"] for row in found["models"] if row["topic"] == OVERALL]
    cell = {(row["model"], row["topic"]): row for row in found["models"]}
    nats = {place: f"{row['survival_nll']:.4f}" for place, row in cell.items()}
    topics = list(dict.fromkeys(row["topic"] for row in found["models"]))
    lines += [tables.markdown(("topic", "rounds", "a = 0", *names), [
        [topic, cell[names[0], topic]["n"], _n(cell[names[0], topic]["a0"], 3), *(nats[name, topic] for name in names)]
        for topic in topics
    ])]  # fmt: skip
    lines += ["## Vision, by topic", "", _comparisons(found["vision"])]
    lines += ["## Logistic regression of a = 0", "", found["logistic_how"], "", _comparisons(found["logistic"])]
    head = ("topic", "rounds with an image", "KL, mean nats", "choice changed", *found["rank_names"])
    lines += ["## Labels", "", tables.markdown(head, [
        [row["topic"], row["n"], _n(row["dependence"], 3), _n(row["changed"], 3), *(_n(r, 2) for r in row["ranks"])]
        for row in found["labels"]
    ])]  # fmt: skip
    return "\n".join(lines)


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("without", "topic", "gain, nats a round", "95%", "p (Holm)", "so it")
    return tables.markdown(head, [
        [
            r["without"], r["topic"], f"{r['gain']:+.4f}", f"{r['lo']:+.4f} to {r['hi']:+.4f}", _n(r["p_holm"], 3),
            verdict(r),
        ]
        for r in rows
    ])  # fmt: skip


def _gain(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    for row in rows:
        if row["without"] == name and row["topic"] == OVERALL:
            return [f"{row['gain']:+.4f}", f"{row['lo']:+.4f} to {row['hi']:+.4f}", _n(row["p_holm"], 3)]
    return ["", "", ""]


def _n(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"
