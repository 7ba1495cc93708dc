"""What an image shows, drawn at random: shapes on a 3 x 3 grid, signs with words, or a bar chart.

Invariant: `Scene.key()` names the content (not the jitter of its drawing), and `Scene.bucket()` is a pure function of
that key. Each split owns its buckets, so no scene of one split can occur in another.
"""

import hashlib
import random
from dataclasses import dataclass

from mmspec.synth.lexicon import COLOURS, POSITIONS, SHAPES, WORDS

N_BUCKETS = 10
N_BAR_SLOTS = 5
MAX_BAR_VALUE = 9


@dataclass(frozen=True)
class Item:
    """A coloured shape in a cell of the 3 x 3 grid."""

    cell: int  # 0..8 in reading order
    colour: str
    shape: str

    @property
    def name(self) -> str:
        """'red circle'."""
        return f"{self.colour} {self.shape}"

    @property
    def position(self) -> str:
        """'top left'."""
        return POSITIONS[self.cell]


@dataclass(frozen=True)
class Sign:
    """A coloured plate with a word on it that fills one row of the grid."""

    row: int  # 0..2
    colour: str
    word: str


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; colours are distinct within a chart."""

    slot: int  # 0..4 from the left
    colour: str
    value: int  # 1..9


@dataclass(frozen=True)
class Scene:
    """The content of one image."""

    kind: str  # "grid" | "sign" | "chart"
    items: tuple[Item, ...] = ()
    signs: tuple[Sign, ...] = ()
    bars: tuple[Bar, ...] = ()

    def key(self) -> str:
        """A canonical text of the content; equal scenes have equal keys."""
        parts = [f"{i.cell}{i.colour}{i.shape}" for i in self.items]
        parts += [f"{s.row}{s.colour}{s.word}" for s in self.signs]
        parts += [f"{b.slot}{b.colour}{b.value}" for b in self.bars]
        return "|".join(parts)

    def bucket(self) -> int:
        """0..9, by hash of the key: which split may show this scene."""
        return int.from_bytes(hashlib.sha256(self.key().encode()).digest()[:8], "big") % N_BUCKETS


def draw(kind: str, buckets: frozenset[int], rng: random.Random) -> Scene:
    """A random scene of `kind` whose bucket is one of `buckets`.

    Args:
        kind: "grid", "sign" or "chart".
        buckets: Allowed buckets, not empty.
        rng: Source of all choices.

    Returns:
        The first scene drawn that falls into an allowed bucket.

    Raises:
        ValueError: If `kind` is unknown.
    """
    makers = {"grid": _grid, "sign": _sign, "chart": _chart}
    if kind not in makers:
        raise ValueError(f"unknown scene kind {kind!r}: use one of {sorted(makers)}")
    while True:
        scene = makers[kind](rng)
        if scene.bucket() in buckets:
            return scene


def _items(cells: list[int], rng: random.Random) -> tuple[Item, ...]:
    """One item a cell, no (colour, shape) twice; half of the time from few colours and shapes, so that counts vary."""
    colours, shapes = list(COLOURS), list(SHAPES)
    if rng.random() < 0.5:
        colours = rng.sample(colours, 3)
        shapes = rng.sample(shapes, 3)
    pairs = rng.sample([(c, s) for c in colours for s in shapes], len(cells))
    return tuple(Item(cell, c, s) for cell, (c, s) in zip(sorted(cells), pairs, strict=True))


def _grid(rng: random.Random) -> Scene:
    number = rng.choice((2, 3, 3, 4, 4, 5, 5, 6))
    return Scene("grid", items=_items(rng.sample(range(9), number), rng))


def _sign(rng: random.Random) -> Scene:
    rows = sorted(rng.sample(range(3), rng.choice((1, 1, 2))))
    words = rng.sample(WORDS, len(rows))
    colours = rng.sample(list(COLOURS), len(rows))
    signs = tuple(Sign(r, c, w) for r, c, w in zip(rows, colours, words, strict=True))
    free = [cell for cell in range(9) if cell // 3 not in rows]
    return Scene("sign", items=_items(rng.sample(free, rng.choice((1, 2))), rng), signs=signs)


def _chart(rng: random.Random) -> Scene:
    slots = sorted(rng.sample(range(N_BAR_SLOTS), rng.choice((3, 4, 4, 5))))
    colours = rng.sample(list(COLOURS), len(slots))
    values = [rng.randint(1, MAX_BAR_VALUE) for _ in slots]
    return Scene("chart", bars=tuple(Bar(s, c, v) for s, c, v in zip(slots, colours, values, strict=True)))
