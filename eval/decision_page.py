"""The page of the controller's decisions: answers with every token's origin and plan, and the figures as charts.

Invariant: one file without scripts or network; everything on it can be read without pointing at anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from eval.decision_figures import LEVELS, Answered, level
from eval.plots import Series, line_chart, ticks
from eval.policy_tables import EVEN, reliability_lines
from eval.samples import texts, thumbnail
from eval.summary import OVERALL, number
from mmspec import metrics
from mmspec.files import write_text
from mmspec.pages import template
from mmspec.types import Target

TEMPLATE = Path(__file__).with_name("decisions.html.j2")
N_SHADES = 8
"""Shades of accepted drafts: deeper ones share the last."""


def collect(target: Target, answers: Sequence[Answered]) -> list[dict[str, Any]]:
    """What is shown of answers: nobody picks them, it is the first of each topic.

    Args:
        target: decodes the tokens.
        answers: of all requests.

    Returns:
        Dicts of `topic, id, turn, question, image (data URI or ""), mat, n_tokens, cut, rounds`; a round has
        `number, plan, nodes, foreseen, unseen (why nothing is), none (stated chance that nothing is accepted),
        accepted, tokens`; a token has `text, css, title`.
    """
    first = [next(members) for _, members in groupby(answers, key=lambda answer: answer.task.record.topic)]
    return [_sample(target, answer) for answer in first]


def _sample(target: Target, answer: Answered) -> dict[str, Any]:
    task, output = answer.task, answer.output
    tokens = texts(target, output.tokens, output.rounds)
    rounds = list(_rounds(answer, tokens))
    return {
        "topic": task.record.topic,
        "id": task.record.id,
        "turn": task.turn,
        "question": task.record.turns[task.turn - 1],
        "image": thumbnail(task.record),
        "mat": metrics.mat([output]),
        "n_tokens": len(output.tokens),
        "cut": len(output.tokens) - len(tokens),
        "rounds": rounds,
    }


def _rounds(answer: Answered, tokens: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The prefill, which has no plan, and every round that is shown."""
    yield {"number": 0, "plan": None, "tokens": [_token(answer, tokens[0], 0, 0, "prefill: the target's own")]}
    at = 1
    for number_, (decision, (_, nodes, accepted, emitted)) in enumerate(
        zip(answer.decisions, answer.output.rounds, strict=True), start=1
    ):
        if at >= len(tokens):
            return
        foreseen, chances = decision.foreseen, decision.chances
        entry: dict[str, Any] = {
            "number": number_, "plan": decision.depth, "nodes": nodes, "foreseen": foreseen, "unseen": decision.unseen,
            "none": None if chances is None else 1 - chances[0], "accepted": accepted, "kept": emitted,
        }  # fmt: skip
        entry["title"] = title = _words(entry)
        here = tokens[at : at + emitted]
        entry["tokens"] = [_token(answer, t, at + k, k + 1, title) for k, t in enumerate(here)]
        yield entry
        at += emitted


def _words(entry: Mapping[str, Any]) -> str:
    """A round in a sentence."""
    what = f"round {entry['number']}: "
    if not entry["plan"]:
        none = entry["unseen"] or f"chance that nothing is accepted {entry['none']:.0%}"
        return f"{what}no draft ({none})"
    foreseen = entry["unseen"] or f"{entry['foreseen']:.1f} foreseen"
    return f"{what}{entry['plan']} levels, {entry['nodes']} nodes planned, {foreseen}, {entry['accepted']} accepted"


def _token(answer: Answered, token: Mapping[str, Any], at: int, depth: int, title: str) -> dict[str, str]:
    """A token with its classes: source, level of the draft, level of dependence."""
    source = token["source"]
    css = f"t t-{source}" + (f" d{min(depth, N_SHADES)}" if source == "draft" else "")
    words = f"draft level {depth}" if source == "draft" else source
    if answer.kl is not None:
        css += f" k{level(float(answer.kl[at]))}"
        words += f", dependence {float(answer.kl[at]):.3f} nats"
    return {"text": token["text"], "css": css, "title": f"{words}; {title}"}


def words(result: Mapping[str, Any]) -> list[str]:
    """The result in a few lines."""
    row, quality, who = result["topics"][OVERALL], result["skips"]["planned"], decider(result)
    plan = "plain decoding" if not row["best_depth"] else f"depth {row['best_depth']} always"
    expects = (
        f"of a draft that it makes the controller expects {number(row['foreseen'])} tokens, and "
        f"{number(row['accepted'])} are accepted"
    )
    if not result["asks"]:
        expects = "the controller is not asked here, as it would not repay its own time: drafts have their usual depth"
    said = [
        f"{result['n_requests']} requests, {row['rounds']} rounds, MAT {number(row['mat'])}, "
        f"{number(100 * row['skip_rate'], 1)}% of them skipped",
        expects,
        f"rate by the cost table: {who} {number(row['controller'])}x plain decoding, best fixed choice ({plan}) "
        f"{number(row['best_fixed'])}x, hindsight {number(row['hindsight'])}x, regret {number(row['regret'], 3)}",
        f"skips: precision {number(quality['precision'])}, recall {number(quality['recall'])} of rounds of which "
        "nothing would have been accepted",
    ]
    if result["n_differing"]:
        said.append(
            f"{result['n_differing']} requests left out: their two answers differ (ties of the target's logits)"
        )
    if result["n_short"]:
        said.append(
            f"{result['n_short']} requests left out: their answers are over before a round that could be judged"
        )
    return said


def decider(result: Mapping[str, Any]) -> str:
    """Whose plans are judged: where the controller is not asked, those of the rule that stands in for it."""
    return "controller" if result["asks"] else "usual depth"


def write(path: Path, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render(result, samples))


def render(result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The page as text.

    Args:
        result: as it is written to the JSON file.
        samples: see `collect`.
    """
    lines = reliability_lines(result["calibration"])
    return template(TEMPLATE, number=number).render(
        result=result,
        said=words(result),
        who=decider(result),
        overall=result["topics"][OVERALL],
        samples=samples,
        reliability=[(line.name, line.css) for line in lines],
        reliability_chart=_reliability(lines),
        skip_chart=_skip_chart(result["skips"]["stated"]),
        level_chart=_level_chart(result["levels"]),
        batch_chart=_batch_chart(result["batches"]),
        cells=[],
        n_levels=len(LEVELS),
        level_names=LEVELS,
        n_shades=N_SHADES,
    )


def _reliability(lines: Sequence[Series]) -> str:
    honest = Series("as stated", "m-rest", [(0.0, 0.0), (1.0, 1.0)])
    return line_chart([honest, *lines], "stated chance", "share accepted", EVEN, EVEN) if lines else ""


def _skip_chart(stated: Mapping[str, Mapping[str, Any]]) -> str:
    """Precision and recall of `a = 0` by the chance below which it is said."""
    lines = [
        Series(name, css, [(float(t), row[name]) for t, row in stated.items() if row[name] is not None])
        for name, css in (("precision", "m0"), ("recall", "m1"))
    ]
    shown = [line for line in lines if line.points]
    return line_chart(shown, "said where the chance is below", "share", EVEN, EVEN) if shown else ""


def _level_chart(levels: Sequence[Mapping[str, Any]]) -> str:
    """Chance of the first draft token by visual dependence: stated, and what came of it."""
    lines = [
        Series(name, css, [(float(k), row[key]) for k, row in enumerate(levels, start=1) if row[key] is not None])
        for name, key, css in (("foreseen", "foreseen", "m0"), ("accepted", "right", "m2"))
    ]
    places = [float(k) for k in range(1, len(LEVELS) + 1)]
    return line_chart(lines, "level of visual dependence", "first draft token right", places, EVEN) if levels else ""


def _batch_chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rates by batch size."""
    batches = sorted({float(row["batch"]) for row in rows})
    names = dict.fromkeys(row["policy"] for row in rows)
    lines = [
        Series(name, f"m{k}", [(float(r["batch"]), r["speedup"]) for r in rows if r["policy"] == name])
        for k, name in enumerate(names)
    ]
    top = max((row["speedup"] for row in rows), default=1.0)
    even = Series("plain decoding", "m-rest", [(0.0, 1.0), (batches[-1], 1.0)])
    return line_chart([even, *lines], "batch size", "rate over plain decoding's", [0.0, *batches], ticks(top))
