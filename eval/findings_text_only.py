"""The first finding: what a head that was trained on text alone is worth on multimodal prompts, by topic and by tokens.

Invariant: both heads drafted for the same prompts and learned from the same words; only one of them ever saw a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.dependence import chart
from eval.findings_runs import Found, Run, shown, speedup_table
from eval.summary import OVERALL, gained
from eval.tasks import PLAIN
from eval.verdicts import MARGIN, Claim, estimate, family, totals

FINDING = "speculative decoding made for text-only models degrades on multimodal prompts."
SEEING, TEXT = "multimodal", "text_only"
"""Roles; further heads stand in the tables."""
LOW = 5
"""Deciles of visual dependence that tokens hardly depend on the image in."""


def found(run: Run, heads: Mapping[str, str], dependence: Mapping[str, Any], seed: int = 0) -> Found:
    """What came of it.

    Args:
        run: all heads with one tree at one batch size.
        heads: run folders by role.
        dependence: of eval.dependence, the multimodal head first.
        seed: of the bootstrap.
    """
    names = {role: run.name(folder) for role, folder in heads.items()}
    [batch] = run.batches
    seeing, text = names[SEEING], names[TEXT]
    places = [OVERALL, *run.topics()]
    forwards = [estimate(place, *run.rounds(batch, text, seeing, place), totals, seed) for place in places]
    seconds = [estimate(place, *run.seconds(batch, text, seeing, place), totals, seed) for place in places]
    worth = [estimate(place, *run.seconds(batch, PLAIN, text, place), totals, seed) for place in places]
    deciles = gains(dependence, list(dependence["checkpoints"]))
    claims = [
        Claim(
            "A head trained on text alone accepts less on multimodal prompts than one trained with pictures",
            "Forwards of the target it takes for the same tokens, over the other's", family(forwards), run.valid,
        ),
        Claim(
            "It is slower for it", "Seconds it takes for the same tokens, over the other's", family(seconds), run.valid
        ),
        Claim("It still pays", "Seconds of plain decoding over its own", family(worth), run.valid),
    ]  # fmt: skip
    return Found(
        FINDING,
        claims,
        {
            "What each is worth (topics: MAT / speedup)": speedup_table(run, names, batch),
            f"Where it lacks: {where(deciles)}": decile_table(dependence, deciles),
        },
        {"": chart(dependence["overall"], list(dependence["checkpoints"]), "Acceptance by visual dependence")},
        run,
        {"deciles": deciles, "where": where(deciles)},
    )


def gains(dependence: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, float]]:
    """Acceptance that the first checkpoint has over the second, with its interval, by decile; without those in which
    nothing was offered, or that has none."""
    rows = []
    for row in dependence["overall"]:
        cell = row["checkpoints"][names[1]]
        if cell.get("gain_lo") is not None:
            rows.append({"decile": row["decile"], **{key: cell[key] for key in ("gain", "gain_lo", "gain_hi")}})
    return rows


def where(deciles: Sequence[Mapping[str, float]]) -> str:
    """Whether what it lacks lies at the tokens that depend on the image; by intervals that do not overlap."""
    low = [row for row in deciles if row["decile"] <= LOW]
    high = [row for row in deciles if row["decile"] == 10]
    if not low or not high:
        return "not decidable here"
    if high[0]["gain_lo"] > max(row["gain_hi"] for row in low):
        return "at the tokens that depend most on the image, more than at any of the lower half"
    if high[0]["gain_hi"] < MARGIN and max(row["gain_hi"] for row in low) < MARGIN:
        return f"nowhere by more than {MARGIN:.0%} of the tokens"
    if min(row["gain_lo"] for row in low) > high[0]["gain_hi"]:
        return "at tokens that do not depend on the image, more than at those that do"
    return "not decidable here: the intervals overlap"


def decile_table(dependence: Mapping[str, Any], deciles: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Acceptance by decile, a column a checkpoint, and the first one's gain over the second."""
    names = list(dependence["checkpoints"])
    by = {row["decile"]: row for row in deciles}
    lines = [["decile", "KL (nats)", *names, f"gain of {names[0]} over {names[1]} [95%]"]]
    for row in dependence["overall"]:
        cells = [row["checkpoints"][name]["acceptance"] for name in names]
        gain = by.get(row["decile"])
        said = "-" if gain is None else gained(gain)
        kl = row.get("dependence")
        accepted = ["-" if cell is None else shown(cell) for cell in cells]
        lines.append([str(row["decile"]), "-" if kl is None else shown(kl, 4), *accepted, said])
    return lines
