"""A page of training samples as the model sees them: pictures, every token of the template, and which are learned.

Invariant: one file without scripts or network; what is shown was read, encoded and marked by the functions that
training uses. Nobody picks the samples: they are drawn with the recipe's seed.
"""

from __future__ import annotations

import base64
import io
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmspec.files import write_text
from mmspec.pages import template
from mmspec.recipe import Data, Recipe
from mmspec.records import RecordError
from mmspec.types import Prompt
from train.answers import BAD, DEGENERATE, GOOD, Dialogue, Prepared
from train.asking import instruction_of, is_sampled
from train.corpus import Corpus, Picture, Sample
from train.decontaminate import Listing
from train.encode import encode, length_limit

TEMPLATE = Path(__file__).with_name("showing.html.j2")
THUMBNAIL = 240
BINS = 24
TOKENS = 1200
"""Of a sample that are shown."""
REMOVED = 12
"""Samples that decontamination removed, of those that are shown."""
CONTEXT = 6
"""Tokens before one that decide how it is spelled (a space, a character over several tokens)."""


@dataclass
class Inspected:
    """What a page is about.

    Args:
        recipe: its settings.
        everything: all usable samples of its sources.
        corpus: those that are trained on, with their instructions.
        prepared: their answers, as far as there are any.
        target: that encodes them.
        reasons: of the records that could not be read, with counts.
        listing: what decontamination removed; None without a list.
        notes: what the reader should know, a sentence each.
    """

    recipe: Recipe
    everything: Corpus
    corpus: Corpus
    prepared: Prepared
    target: Any
    reasons: Mapping[str, int]
    listing: Listing | None = None
    notes: list[str] = field(default_factory=list)


def write(path: Path, inspected: Inspected, n_samples: int) -> None:
    """Writes the page, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Ids and file names may hold what UTF-8 cannot.
    write_text(path, render(inspected, n_samples), errors="replace")


def render(inspected: Inspected, n_samples: int) -> str:
    """The page as text.

    Args:
        n_samples: drawn at random, or all there are.
    """
    recipe, prepared = inspected.recipe, inspected.prepared
    shown = [_sample(inspected, index) for index in draw(inspected, n_samples)]
    lengths = prepared.lengths[prepared.status == GOOD].tolist()
    return template(TEMPLATE).render(
        recipe=recipe,
        title=f"{recipe.run.name}: training data",
        figures=figures(inspected),
        notes=inspected.notes,
        samples=shown,
        histogram=histogram(lengths or [one["n_tokens"] for one in shown if one["n_tokens"]]),
        measured="all that have answers" if lengths else "those shown below",
        limit=length_limit(recipe.data, inspected.target),
        table=table(inspected),
        answers=provenance(inspected),
        reasons=dict((Counter(inspected.reasons) + Counter(prepared.reasons(BAD))).most_common()),
        dropped=prepared.reasons(DEGENERATE),
        listing=inspected.listing,
        removed=removed(inspected),
    )


def figures(inspected: Inspected) -> list[tuple[str, int, str]]:
    """Name, number and meaning of the headline figures: the first is the sum of the others."""
    status = inspected.prepared.status
    bad, dropped = int((status == BAD).sum()), int((status == DEGENERATE).sum())
    quarantined = sum(inspected.reasons.values()) + bad
    out = sum(inspected.corpus.removed.values())
    left = len(inspected.corpus) - bad - dropped
    found = [
        ("records", inspected.corpus.n_read, "read from all sources"),
        ("usable", left, f"{int((status == GOOD).sum())} of them have their answers"),
        ("quarantined", quarantined, "cannot be read or encoded"),
        ("left out", out, "occur in the benchmark"),
    ]
    return found + [("dropped", dropped, "degenerate answers")] * bool(dropped)


def draw(inspected: Inspected, n: int) -> list[int]:
    """Which samples are shown, in the order of the corpus: of those with answers, where there are any."""
    pool: Sequence[int] = inspected.prepared.usable or range(len(inspected.corpus))
    return sorted(random.Random(inspected.recipe.run.seed).sample(pool, min(n, len(pool))))


def table(inspected: Inspected) -> list[tuple[str, str, int, float]]:
    """Source, topic, samples and weight, the largest first."""
    counts: Counter[tuple[str, str, float]] = Counter()
    for sample, weight in zip(inspected.corpus.samples, inspected.corpus.weights):
        counts[str(sample.file), sample.topic, float(weight)] += 1
    return [(source, topic, n, weight) for (source, topic, weight), n in counts.most_common()]


def provenance(inspected: Inspected) -> dict[str, dict[str, int]]:
    """Where the conversations' answers come from, and how the single answers ended, with counts."""
    origins: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    for index, dialogue in inspected.prepared.dialogues.items():
        origins[_origin(inspected.recipe.data, index)] += 1
        ends.update("ended in a stop token" if done else "cut at its limit" for done in dialogue.finished)
    found = {"conversations": dict(origins.most_common()), "single answers": dict(ends.most_common())}
    return found if origins else {}


def histogram(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Bars of equal width over [0, longest]: `bars` of (from, to, count, percent of the highest), and quantiles."""
    if not lengths:
        return None
    width = max(1, -(-(max(lengths) + 1) // BINS))
    counts = np.bincount(np.asarray(lengths) // width, minlength=BINS)
    bars = [(k * width, (k + 1) * width - 1, int(n), 100 * int(n) / int(counts.max())) for k, n in enumerate(counts)]
    return {
        "bars": bars,
        "n": len(lengths),
        "shortest": min(lengths),
        "median": int(statistics.median(lengths)),
        "longest": max(lengths),
    }


def removed(inspected: Inspected) -> list[dict[str, Any]]:
    """Some of the samples that decontamination removed, spread over all of them."""
    entries = inspected.listing.removed if inspected.listing is not None else []
    stride = -(-len(entries) // REMOVED) or 1
    out = []
    for entry in entries[::stride]:
        sample = inspected.everything.samples[entry.index]
        pictures = [thumbnail(picture) for picture in sample.pictures[:2]]
        out.append({"entry": entry, "pictures": pictures, "question": sample.turns[0]})
    return out


def thumbnail(picture: Picture) -> str:
    """A small JPEG as a data URI; "" of a picture that cannot be read."""
    try:
        image = picture.open()
    except RecordError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spelled(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens included; "" where a character goes on."""
    texts, start = [], 0
    for place in range(len(ids)):
        # Decoding from some way back keeps this linear. A character that is not finished has no text yet.
        before = tokenizer.decode(ids[start:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = tokenizer.decode(ids[start : place + 1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        unfinished = whole.endswith("\ufffd") and place + 1 < len(ids)
        texts.append("" if unfinished else whole[len(before.rstrip("\ufffd")) :])
        if not unfinished:
            start = max(start, place + 1 - CONTEXT)
    return texts


def pieces(target: Any, prompt: Prompt, answer: Any) -> list[dict[str, Any]]:
    """A conversation as `{kind, text, ids}`: a token each, but all of a picture together.

    Args:
        answer: [L] reply numbers, as `train.encode.encode` gives them.

    Returns:
        kind: `image`, `answer` (learned), or `prompt`; `special` is whether it is a special token.
    """
    ids, visual, marks = prompt.input_ids.tolist(), prompt.visual.tolist(), answer.tolist()
    out: list[dict[str, Any]] = []
    texts = spelled(target.processor.tokenizer, ids)
    specials = set(target.processor.tokenizer.all_special_ids)
    for token, text, image, mark in zip(ids, texts, visual, marks):
        if image:
            if out and out[-1]["kind"] == "image":
                out[-1]["n"] += 1
            else:
                out.append({"kind": "image", "n": 1, "text": "", "id": token, "special": False})
            continue
        kind = "answer" if mark else "prompt"
        out.append({"kind": kind, "n": 1, "text": _visible(text), "id": token, "special": token in specials})
    return out


def _sample(inspected: Inspected, index: int) -> dict[str, Any]:
    sample, target = inspected.corpus.samples[index], inspected.target
    dialogue = _dialogue(inspected, index, sample)
    limit = length_limit(inspected.recipe.data, target)
    found: dict[str, Any] = {
        "id": sample.id,
        "place": f"{sample.file}:{sample.line}",
        "topic": sample.topic,
        "pictures": [(picture.name, thumbnail(picture)) for picture in sample.pictures],
        "origin": _origin(inspected.recipe.data, index)
        if dialogue is not None
        else "not answered yet: the first prompt",
        "problem": "",
        **{"pieces": [], "n_tokens": 0, "n_learned": 0, "hidden": 0, "cut": 0},
    }
    try:
        if dialogue is not None:
            prompt, answer = encode(sample, dialogue, target, limit)
            found["cut"] = len(dialogue.finished) - sum(dialogue.finished)
        else:
            prompt = target.encode(sample.messages([], 1), [picture.open() for picture in sample.shown(1)])
            answer = prompt.input_ids.new_zeros(len(prompt))
    except ValueError as error:
        found["problem"] = str(error)
        return found
    tokens = pieces(target, prompt, answer)
    found |= {"n_tokens": len(prompt), "n_learned": int((answer > 0).sum())}
    return found | {"pieces": tokens[:TOKENS], "hidden": max(0, len(tokens) - TOKENS)}


def _dialogue(inspected: Inspected, index: int, sample: Sample) -> Dialogue | None:
    """Its answers: those that training would use, or those that the file gives where it would use these."""
    if index in inspected.prepared.dialogues:
        return inspected.prepared.dialogues[index]
    if inspected.recipe.data.answers == "given" and sample.answers:
        return Dialogue(sample.answers, (True,) * len(sample.answers), 0)
    return None


def _origin(data: Data, index: int) -> str:
    if data.answers == "given":
        return "given by the file"
    how = f"sampled at temperature {data.temperature:g}" if is_sampled(data, index) else "greedy"
    instruction = instruction_of(data, index)
    asked = f", asked besides: {instruction.text}" if instruction is not None and instruction.text else ""
    return f"the target's own, {how}{asked}"


def _visible(text: str) -> str:
    """Line ends as a sign and a line end, other control characters as their picture."""
    signs = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {10: "\u21b5\n"}
    return text.translate(signs)
