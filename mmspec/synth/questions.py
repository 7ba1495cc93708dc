"""Short questions with one-sentence answers: general VQA, text VQA and charts."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from mmspec.synth.lexicon import COLOURS, NUMBERS, ROWS, article, counted, listed, plural
from mmspec.synth.scene import Scene
from mmspec.synth.wording import Wording


@dataclass(frozen=True)
class Turn:
    """One question with its answer and what a correct answer must contain, as (kind, expected) pairs."""

    question: str
    answer: str
    facts: tuple[tuple[str, str], ...]


Maker = Callable[[Scene, random.Random, Wording], Turn | None]
"""Builds a turn, or None if the scene does not allow an unambiguous question of this type."""


def first_that_fits(makers: tuple[Maker, ...], scene: Scene, rng: random.Random) -> Turn:
    """A turn of a random type among those that the scene allows.

    Raises:
        ValueError: If no type fits, which is a fault in the list of makers.
    """
    for maker in rng.sample(makers, len(makers)):
        turn = maker(scene, rng, Wording(rng))
        if turn is not None:
            return turn
    raise ValueError(f"no question fits the scene {scene.key()!r}")


def _unique(values: list[str]) -> list[str]:
    return [value for value, n in Counter(values).items() if n == 1]


def colour_of_shape(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'What colour is the star?', where there is one star."""
    shapes = _unique([i.shape for i in scene.items])
    if not shapes:
        return None
    shape = rng.choice(shapes)
    item = next(i for i in scene.items if i.shape == shape)
    colour = item.colour
    other = rng.choice([c for c in COLOURS if c != colour])
    first, second = rng.sample([colour, other], 2)
    question = w.ask(
        (
            "What colour is the {shape}[?| in the image?]",
            "Is the {shape} {first} or {second}?",
            "[Tell me|Please tell me|Can you say] the colour of the {shape}.",
            "Which colour does the {shape} have[?| in this picture?]",
        ),
        shape=shape,
        first=first,
        second=second,
    )
    answer = w.say(
        "[The {shape} in the {place} is {colour}.|The colour of the {shape} in the [picture|image] is {colour}."
        "|It is {article} {shape}, [and it is|placed] in the {place}."
        "|The {shape} is {colour}, as [far as I|you] can see.]",
        shape=shape,
        colour=colour,
        place=item.position,
        article=article(colour),
    )
    return Turn(question, answer, (("colour", colour),))


def shape_of_colour(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'Which shape is red?', where one shape is."""
    colours = _unique([i.colour for i in scene.items])
    if not colours:
        return None
    colour = rng.choice(colours)
    item = next(i for i in scene.items if i.colour == colour)
    shape = item.shape
    question = w.ask(
        (
            "Which shape is {colour}[?| in the image?]",
            "What is the {colour} [object|thing][?| in the picture?]",
            "[Name|Identify] the shape that is {colour}.",
        ),
        colour=colour,
    )
    answer = w.say(
        "[The {colour} [object|shape] is {a_shape} in the {place}."
        "|There is one {colour} shape, [namely|and it is] {a_shape}."
        "|It is the {shape} in the {place} that is {colour}.]",
        colour=colour,
        place=item.position,
        shape=shape,
        a_shape=article(shape),
    )
    return Turn(question, answer, (("shape", shape),))


def place_of_item(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'Where is the red star?'"""
    item = rng.choice(scene.items)
    question = w.ask(
        (
            "Where is the {name}[?| in the image?]",
            "In which [part|area] of the picture is the {name}?",
            "[Find|Locate] the {name}.",
            "What is the position of the {name}?",
        ),
        name=item.name,
    )
    answer = w.say(
        "[The {name} is [in|located in] the {position}[.| of the image.]"
        "|You can [find|see] the {name} in the {position}.|It is in the {position} of the [picture|image].]",
        name=item.name,
        position=item.position,
    )
    return Turn(question, answer, (("position", item.position),))


def item_at_place(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'What is in the top left?'"""
    item = rng.choice(scene.items)
    question = w.ask(
        (
            "What is in the {position}[?| of the image?]",
            "Which object do you see in the {position}?",
            "What [is shown|can be seen] in the {position} of the picture?",
        ),
        position=item.position,
    )
    answer = w.say(
        "[There is {name} in the {position} of the [image|picture].|The {position} of the image shows {name}."
        "|I [can see|see] {name} in [that place|that part of the image].]",
        name=article(item.name),
        position=item.position,
    )
    return Turn(question, answer, (("colour", item.colour), ("shape", item.shape)))


def count_items(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'How many stars are there?'; of one shape, one colour, or all."""
    options = [("shapes", "")]
    options += [(plural(s), s) for s in dict.fromkeys(i.shape for i in scene.items)]
    options += [(f"{c} shapes", c) for c in dict.fromkeys(i.colour for i in scene.items)]
    noun, key = rng.choice(options)
    found = [i for i in scene.items if not key or key in (i.shape, i.colour)]
    one = "shape" if not key else f"{key} shape" if key in COLOURS else key
    question = w.ask(
        (
            "How many {noun} are there[?| in the image?]",
            "How many {noun} [can you see|do you see]?",
            "Count the {noun}[.| in the picture.]",
            "What is the number of {noun}?",
        ),
        noun=noun,
    )
    number = len(found)
    if key:
        # Named before they are counted: a small target looks one up after another, but cannot add up at a glance.
        answer = w.say(
            "[I look for|We look for|Let us look for] {noun}: {places}. [That makes|I count|Together this makes] "
            "{counted}[.| in total.]",
            noun=noun,
            places=listed([f"in the {i.position}" for i in found]),
            counted=counted(number, one),
        )
    else:
        answer = w.say(
            "[There are {counted} in the [picture|image].|I [count|can count|can see] {counted}[.| here.]"
            "|The [picture|image] [shows|contains] {counted}.]",
            counted=counted(number, one),
        )
    return Turn(question, answer, (("count", NUMBERS[number]),))


GENERAL: tuple[Maker, ...] = (colour_of_shape, shape_of_colour, place_of_item, item_at_place, count_items)


def read_sign(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'What does the blue sign say?'"""
    sign = rng.choice(scene.signs)
    names = [f"{sign.colour} sign", f"sign in the {ROWS[sign.row]} row", f"{ROWS[sign.row]} sign"]
    if len(scene.signs) == 1:
        names += ["sign", "sign"]
    name = rng.choice(names)
    question = w.ask(
        (
            "What does the {name} say?",
            "[What|Which word] is written on the {name}?",
            "[Read|Please read] the {name}.",
            "What is the [text|word] on the {name}?",
        ),
        name=name,
    )
    answer = w.say(
        '[The {name} [says|reads] "{word}" in [large|bold] letters.'
        '|The word on the {name} is "{word}"[.|, in capital letters.]'
        '|It says "{word}" on the {colour} [sign|plate] there.'
        '|The text on the {name} [says|reads] "{word}".]',
        name=name,
        word=sign.word,
        colour=sign.colour,
    )
    return Turn(question, answer, (("word", sign.word),))


def read_all_signs(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'Which words can you read?'"""
    question = w.ask(
        (
            "Which words can you read in the image?",
            "[Read|List] all the text in this picture.",
            "What [words|text] can be seen here?",
        )
    )
    words = " and ".join(f'"{s.word}"' for s in scene.signs)
    noun = "word" if len(scene.signs) == 1 else "words"
    answer = w.say(
        "[I can read the {noun} {words} in the [image|picture].|The [image|picture] shows the {noun} {words}."
        "|The {noun} that can be seen here {be} {words}.]",
        noun=noun,
        words=words,
        be="is" if len(scene.signs) == 1 else "are",
    )
    return Turn(question, answer, tuple(("word", s.word) for s in scene.signs))


def colour_of_sign(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'What colour is the sign that says OPEN?'"""
    sign = rng.choice(scene.signs)
    question = w.ask(
        (
            "What colour is the sign that says {word}?",
            'Which colour does the "{word}" sign have?',
            "[Tell me|Please tell me] the colour of the sign with the word {word}.",
        ),
        word=sign.word,
    )
    answer = w.say(
        '[The sign that says "{word}" is {colour}.|The word "{word}" is [written|shown] on {article} sign.'
        '|It is {article} sign with the word "{word}".]',
        word=sign.word,
        colour=sign.colour,
        article=article(sign.colour),
    )
    return Turn(question, answer, (("colour", sign.colour),))


TEXT: tuple[Maker, ...] = (read_sign, read_sign, read_all_signs, colour_of_sign)


def bar_value(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'What is the value of the red bar?'"""
    bar = rng.choice(scene.bars)
    question = w.ask(
        (
            "What is the value of the {colour} bar?",
            "How [high|tall] is the {colour} bar[?| in this chart?]",
            "[Read|Give] the value of the {colour} bar.",
            "Which value does the {colour} bar [reach|show]?",
        ),
        colour=bar.colour,
    )
    answer = w.say(
        "[The {colour} bar [reaches|shows|has] a value of {value} on the [axis|scale] of this chart."
        "|The value of the {colour} bar in [the|this] chart is {value}[.|, as read on the axis.]"
        "|In this chart, the {colour} bar [stands|is] at {value} on the [axis|scale].]",
        colour=bar.colour,
        value=bar.value,
    )
    return Turn(question, answer, (("bar", str(bar.value)),))


def extreme_bar(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'Which bar is the tallest?'"""
    high = rng.random() < 0.5
    value = (max if high else min)(b.value for b in scene.bars)
    bars = [b for b in scene.bars if b.value == value]
    if len(bars) > 1:
        return None
    word = rng.choice(("tallest", "highest") if high else ("shortest", "lowest"))
    question = w.ask(
        (
            "Which bar is the {word}[?| in the chart?]",
            "What colour is the {word} bar, and what is its value?",
            "[Name|Find] the {word} bar.",
        ),
        word=word,
    )
    answer = w.say(
        "[The {word} bar in the chart is the {colour} [one|bar], with a value of {value}."
        "|The {colour} bar is the {word}[, at {value}.|, with a value of {value}.]"
        "|It is the {colour} bar, which [has|shows] a value of {value}.]",
        word=word,
        colour=bars[0].colour,
        value=value,
    )
    return Turn(question, answer, (("colour", bars[0].colour), ("bar", str(value))))


def bar_difference(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'How much taller is the red bar than the blue bar?'"""
    high, low = sorted(rng.sample(scene.bars, 2), key=lambda b: -b.value)
    if high.value == low.value:
        return None
    question = w.ask(
        (
            "How much [taller|higher] is the {a} bar than the {b} bar?",
            "What is the difference between the {a} and the {b} bar?",
            "By how much does the {a} bar exceed the {b} bar?",
        ),
        a=high.colour,
        b=low.colour,
    )
    answer = w.say(
        "[The {a} bar is {x} and the {b} bar is {y}, so the difference is {d}."
        "|We have {x} for {a} and {y} for {b}, which makes a difference of {d}."
        "|The difference between {a} and {b} is {x} minus {y}, which [is|gives] {d}.]",
        a=high.colour,
        b=low.colour,
        x=high.value,
        y=low.value,
        d=high.value - low.value,
    )
    return Turn(question, answer, (("bar", str(high.value)), ("bar", str(low.value))))


def count_bars(scene: Scene, rng: random.Random, w: Wording) -> Turn | None:
    """'How many bars does the chart have?'"""
    question = w.ask(
        (
            "How many bars [are there|are shown|can be seen] in the chart?",
            "[Count|Please count] the bars[.| in this chart.]",
            "What is the number of bars?",
        )
    )
    answer = w.say(
        "[There are {n} bars in this [bar |]chart, in {n} [different |]colours."
        "|The chart has {n} bars of different colours."
        "|I [count|can count] {n} bars, each in its own colour.]",
        n=NUMBERS[len(scene.bars)],
    )
    return Turn(question, answer, (("count", NUMBERS[len(scene.bars)]),))


CHART: tuple[Maker, ...] = (bar_value, bar_value, extreme_bar, bar_difference, count_bars)
