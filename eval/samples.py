"""Sample answers for the report: which piece of the text came from where.

Invariant: nobody picks them. It is the first request of each topic, and for conversations the first later turn too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from PIL import Image

from eval.bench import Result
from mmspec import metrics
from mmspec.records import Record, RecordError, open_image
from mmspec.types import Target

THUMBNAIL = 320
MAX_TOKENS = 240


def collect(target: Target, records: Sequence[Record], results: Sequence[Result], method: str) -> list[dict[str, Any]]:
    """One sample a topic, and one later turn where there are conversations.

    Args:
        target: decodes the pieces.
        records: by which questions and images are found.
        results: of the run.
        method: whose answers are shown.

    Returns:
        Dicts of `topic, id, turn, question, image (data URI or ""), pieces, mat, n_tokens, cut, match`; `pieces` are
        `{text, source}` with source prefill, draft, bonus or skip.
    """
    by_id = {record.id: record for record in records}
    mine = [result for result in results if result.method == method]
    chosen: list[Result] = []
    for topic in dict.fromkeys(result.topic for result in mine):
        members = [result for result in mine if result.topic == topic]
        chosen.append(members[0])
        chosen += [result for result in members if result.turn > 1][:1]
    samples = []
    for result in chosen:
        record = by_id[result.id]
        samples.append(
            {
                "topic": result.topic,
                "id": result.id,
                "turn": result.turn,
                "question": record.turns[result.turn - 1],
                "image": thumbnail(record),
                "pieces": pieces(target, result.output.tokens, result.output.rounds),
                "mat": metrics.mat([result.output]),
                "n_tokens": len(result.output.tokens),
                "cut": max(0, len(result.output.tokens) - MAX_TOKENS),
                "match": verdict(result.match),
            }
        )
    return samples


def verdict(match: metrics.Match | None) -> str:
    """How a text compares with plain decoding's, in a word."""
    if match is None:
        return "sampled anew"
    return "identical" if match.identical else "tie" if match.tie else "diverged"


def texts(target: Target, tokens: Sequence[int], rounds: Sequence[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """The first tokens of an answer: `{id, text, source}` of each, with source prefill, draft, bonus or skip.

    Each token's text is what it adds to the decoding of the tokens before it (a token alone may lose its space, and a
    character may be spread over several tokens: then the one that completes it gets it).

    Args:
        target: decodes.
        tokens: generated ids.
        rounds: of the same output.
    """
    shown = tokens[:MAX_TOKENS]
    found: list[dict[str, Any]] = []
    done = ""
    for n, source in zip(range(1, len(shown) + 1), metrics.token_sources(rounds)):
        whole = target.decode(shown[:n])
        unfinished = whole.endswith("\ufffd") and n < len(shown)
        text = "" if unfinished else whole[len(done) :]
        found.append({"id": shown[n - 1], "text": text, "source": source})
        done = done if unfinished else whole
    return found


def pieces(target: Target, tokens: Sequence[int], rounds: Sequence[tuple[str, int, int, int]]) -> list[dict[str, str]]:
    """The text cut where the source of its tokens changes; arguments as for `texts`."""
    joined = []
    # Accepted tokens of one round belong together; a bonus ends its round, so equal neighbours never mix two rounds
    # except skipped steps, which are single tokens anyway.
    for source, members in groupby(texts(target, tokens, rounds), key=lambda token: token["source"]):
        text = "".join(token["text"] for token in members)
        if text:
            joined.append({"text": text, "source": source})
    return joined


def thumbnail(record: Record) -> str:
    """A small JPEG as a data URI, "" without an image."""
    if record.image is None:
        return ""
    try:
        image = open_image(record.image)
    except RecordError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
