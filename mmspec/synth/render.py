"""Draws a scene as a 96 x 96 RGB image.

The grid's cells are 32 pixels and the chart's columns 16 pixels wide, so both align with patches of 16 pixels.
"""

import math
import random
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from mmspec.synth.lexicon import COLOURS
from mmspec.synth.scene import Item, Scene, Sign

SIZE = 96
CELL = 32
BAR_LEFT, BAR_STEP, BAR_UNIT, BAR_BASE = 16, 16, 8, 88
LIGHT_PLATES = ("yellow", "pink", "orange")


def render(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene as an image.

    Args:
        scene: What to draw.
        rng: Source of the jitter in background, tint, size and place.

    Returns:
        An RGB image of 96 x 96 pixels.
    """
    background = tuple(rng.randint(232, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), background)
    pen = ImageDraw.Draw(image)
    if scene.bars:
        _draw_chart(pen, scene, rng)
    for sign in scene.signs:
        _draw_sign(pen, sign, rng)
    for item in scene.items:
        _draw_item(pen, item, rng)
    return image


def _tint(colour: str, rng: random.Random) -> tuple[int, int, int]:
    r, g, b = COLOURS[colour]
    low, high = -10, 10
    return (
        _clip(r + rng.randint(low, high)),
        _clip(g + rng.randint(low, high)),
        _clip(b + rng.randint(low, high)),
    )


def _clip(value: int) -> int:
    return max(0, min(255, value))


def _draw_item(pen: ImageDraw.ImageDraw, item: Item, rng: random.Random) -> None:
    radius = rng.uniform(9.0, 12.5)
    x = (item.cell % 3) * CELL + CELL / 2 + rng.uniform(-2.0, 2.0)
    y = (item.cell // 3) * CELL + CELL / 2 + rng.uniform(-2.0, 2.0)
    fill = _tint(item.colour, rng)
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.shape == "circle":
        pen.ellipse(box, fill=fill)
    elif item.shape == "ring":
        pen.ellipse(box, outline=fill, width=4)
    elif item.shape == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif item.shape == "cross":
        arm = radius * 0.34
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    else:
        pen.polygon([(x + radius * px, y + radius * py) for px, py in _outline(item.shape)], fill=fill)


@lru_cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a polygon in units of its radius."""
    if shape == "triangle":
        return ((0.0, -1.0), (1.0, 0.85), (-1.0, 0.85))
    if shape == "diamond":
        return ((0.0, -1.15), (0.85, 0.0), (0.0, 1.15), (-0.85, 0.0))
    if shape == "star":
        corners = []
        for k in range(10):
            reach = 1.15 if k % 2 == 0 else 0.48
            corners.append((reach * math.sin(k * math.pi / 5), -reach * math.cos(k * math.pi / 5)))
        return tuple(corners)
    raise ValueError(f"no polygon is known for the shape {shape!r}")


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _draw_sign(pen: ImageDraw.ImageDraw, sign: Sign, rng: random.Random) -> None:
    top = sign.row * CELL
    pen.rounded_rectangle((2, top + 3, SIZE - 3, top + CELL - 4), radius=4, fill=_tint(sign.colour, rng))
    ink = (20, 20, 25) if sign.colour in LIGHT_PLATES else (250, 250, 250)
    size = 21
    while pen.textlength(sign.word, font=_font(size)) > SIZE - 10:
        size -= 1
    place = (SIZE / 2 + rng.uniform(-1.5, 1.5), top + CELL / 2 + rng.uniform(-1.0, 1.0))
    pen.text(place, sign.word, font=_font(size), fill=ink, anchor="mm")


def _draw_chart(pen: ImageDraw.ImageDraw, scene: Scene, rng: random.Random) -> None:
    for value in range(1, 10):
        y = BAR_BASE - value * BAR_UNIT
        if value % 2 == 0:
            pen.line((BAR_LEFT, y, SIZE - 1, y), fill=(205, 205, 210))
        pen.line((BAR_LEFT - 3, y, BAR_LEFT - 1, y), fill=(90, 90, 95))
    for bar in scene.bars:
        half = rng.uniform(4.5, 6.5)
        x = BAR_LEFT + bar.slot * BAR_STEP + BAR_STEP / 2
        pen.rectangle((x - half, BAR_BASE - bar.value * BAR_UNIT, x + half, BAR_BASE), fill=_tint(bar.colour, rng))
    pen.line((BAR_LEFT, 8, BAR_LEFT, BAR_BASE), fill=(60, 60, 65))
    pen.line((BAR_LEFT, BAR_BASE, SIZE - 1, BAR_BASE), fill=(60, 60, 65))
