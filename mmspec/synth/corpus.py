"""Samples of the synthetic corpus, a pure function of (split, index), and the check of an answer's facts."""

import hashlib
import random
import re
from dataclasses import dataclass

from PIL import Image

from mmspec.synth import longform, questions
from mmspec.synth.dialogue import conversation
from mmspec.synth.lexicon import COLOURS, NUMBERS, TOPICS
from mmspec.synth.questions import Turn
from mmspec.synth.render import render
from mmspec.synth.scene import N_BUCKETS, Scene, draw

CORPUS_VERSION = 2
"""Part of every seed and of the cache's key: raise it whenever any sample changes."""

SPLITS: dict[str, int] = {"train": 1_000_000, "val": 200, "test": 600, "testmini": 60}
"""Number of samples in each split."""

_PER_TOPIC = {"test": 100, "testmini": 10}
_BUCKETS = {"test": frozenset({0}), "val": frozenset({1}), "train": frozenset(range(2, N_BUCKETS))}


@dataclass(frozen=True)
class Fact:
    """Something that a correct answer contains.

    Attributes:
        turn: Index of the turn it belongs to.
        kind: "colour", "shape", "position", "count", "word" or "bar".
        expected: The words that must occur together ("red circle", "top left", "three"), "<colour> <value>" for one
            bar of a full reading, or "(B)" for a chosen option.
    """

    turn: int
    kind: str
    expected: str


@dataclass(frozen=True)
class Sample:
    """One image with its questions and reference answers.

    Attributes:
        id: Unique within a split; the same in "test" and "testmini".
        image: RGB, 96 x 96.
        turns: The questions.
        answers: One answer a turn, as the templates give it.
        category: MMSpec's category of the topic.
        topic: One of MMSpec's six topics.
        facts: What correct answers contain.
    """

    id: str
    image: Image.Image
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    category: str
    topic: str
    facts: tuple[Fact, ...]


def sample(split: str, index: int) -> Sample:
    """Sample number `index` of a split; the same on every machine.

    Args:
        split: "train", "val", "test" or "testmini". The last is a subset of "test".
        index: 0 <= index < SPLITS[split]. "test" and "testmini" are sorted by topic as MMSpec is; in the others the
            topics take turns.

    Returns:
        The sample with its rendered image.

    Raises:
        ValueError: If the split is unknown.
        IndexError: If the index is outside of the split.
    """
    split, index, topic = _locate(split, index)
    rng, scene, turns, category = _content(split, index, topic)
    facts = tuple(Fact(t, kind, expected) for t, turn in enumerate(turns) for kind, expected in turn.facts)
    return Sample(
        id=f"synth_{split}_{index + 1:03d}",
        image=render(scene, rng),
        turns=tuple(turn.question for turn in turns),
        answers=tuple(turn.answer for turn in turns),
        category=category,
        topic=topic,
        facts=facts,
    )


def scene_of(split: str, index: int) -> Scene:
    """What the image of `sample(split, index)` shows; for warming up a vision tower."""
    return _content(*_locate(split, index))[1]


def _locate(split: str, index: int) -> tuple[str, int, str]:
    """The split and index that a sample is seeded with, and its topic."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: use one of {', '.join(SPLITS)}")
    if not 0 <= index < SPLITS[split]:
        raise IndexError(f"index {index} is outside of synth:{split}, which has {SPLITS[split]} samples")
    if split == "testmini":
        each = _PER_TOPIC["testmini"]
        stride = _PER_TOPIC["test"] // each
        index = index // each * _PER_TOPIC["test"] + index % each * stride
        split = "test"
    topic = TOPICS[index // _PER_TOPIC[split]] if split in _PER_TOPIC else TOPICS[index % len(TOPICS)]
    return split, index, topic


def _content(split: str, index: int, topic: str) -> tuple[random.Random, Scene, list[Turn], str]:
    """Everything but the image; the generator comes back where rendering goes on."""
    seed = hashlib.sha256(f"{CORPUS_VERSION}:{split}:{index}".encode()).digest()
    rng = random.Random(int.from_bytes(seed[:8], "big"))
    kind = _scene_kind(topic, rng)
    scene = draw(kind, _BUCKETS[split], rng)
    turns, category = _turns(topic, scene, rng)
    return rng, scene, turns, category


def _scene_kind(topic: str, rng: random.Random) -> str:
    """Which kind of scene a topic shows."""
    chance = rng.random()
    if topic == "general vqa":
        return "grid"
    if topic == "text vqa":
        return "sign"
    if topic == "chart understanding":
        return "chart"
    if topic == "complex reasoning pro":
        return "chart" if chance < 0.4 else "grid"
    return "chart" if chance < 0.2 else "sign" if chance < 0.5 else "grid"


def _turns(topic: str, scene: Scene, rng: random.Random) -> tuple[list[Turn], str]:
    """The turns of a record and its category."""
    if topic == "general vqa":
        return [questions.first_that_fits(questions.GENERAL, scene, rng)], "default"
    if topic == "text vqa":
        return [questions.first_that_fits(questions.TEXT, scene, rng)], "text reading"
    if topic == "chart understanding":
        return [questions.first_that_fits(questions.CHART, scene, rng)], "chart reasoning"
    if topic == "image captioning":
        return [longform.caption(scene, rng)], "image captioning"
    if topic == "complex reasoning pro":
        if scene.bars:
            return [longform.bar_arithmetic(scene, rng)], "Economics"
        if rng.random() < 0.5:
            return [longform.add_up_shapes(scene, rng)], "Math"
        return [longform.find_neighbour(scene, rng)], "Design"
    return conversation(scene, rng), {"chart": "charts", "sign": "signs", "grid": "shapes"}[scene.kind]


_WORD = re.compile(r"\([a-d]\)|[a-z]+|\d+")


def _words(text: str) -> list[str]:
    """Lower-case words, option letters and numbers, with number words as digits."""
    words = _WORD.findall(text.lower())
    return [str(NUMBERS.index(word)) if word in NUMBERS else word for word in words]


def check(fact: Fact, answer_text: str) -> bool:
    """Whether an answer contains a fact.

    Case, punctuation and digits against number words do not matter. The words of `expected` must stand next to each
    other. For "(B)" the last option named in the answer must be that one. For a bar's "<colour> <value>" the first
    number after some mention of the colour must be the value, with no other colour between.

    Args:
        fact: What to look for.
        answer_text: The answer to the fact's turn.

    Returns:
        True if it is there.
    """
    wanted, words = _words(fact.expected), _words(answer_text)
    if fact.expected.startswith("("):
        letters = [word for word in words if word.startswith("(")]
        return bool(letters) and letters[-1] == wanted[0]
    if fact.kind == "bar" and len(wanted) == 2:
        return any(word == wanted[0] and _value_after(words[i + 1 :]) == wanted[1] for i, word in enumerate(words))
    n = len(wanted)
    return any(words[i : i + n] == wanted for i in range(len(words) - n + 1))


def _value_after(words: list[str]) -> str | None:
    """The first number, unless a colour comes before it."""
    for word in words:
        if word.isdigit():
            return word
        if word in COLOURS:
            return None
    return None
