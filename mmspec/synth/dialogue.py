"""Conversations of one to three turns about one image: look, think, then write something."""

import random

from mmspec.synth.lexicon import NUMBERS, ROWS, article, counted, listed
from mmspec.synth.longform import by_rows, describe, item_facts
from mmspec.synth.questions import Turn
from mmspec.synth.scene import Scene
from mmspec.synth.wording import Wording


def look(scene: Scene, rng: random.Random) -> Turn:
    """First turn: a description."""
    w = Wording(rng)
    question = w.ask(
        (
            "What do you see in this [image|picture]?",
            "[Describe|Please describe] the [image|picture] first.",
            "[Give me|Write] [an overview|a short description] of this [image|picture].",
        )
    )
    return Turn(question, describe(scene, w), item_facts(scene))


def explain(scene: Scene, rng: random.Random) -> Turn:
    """Second turn: order and comparison, with the reasons."""
    w = Wording(rng)
    if scene.bars:
        return _explain_chart(scene, w)
    question = w.ask(
        (
            "[Go through|Walk me through] the picture row by row and say which row has the most.",
            "How are the things arranged? Explain each row and [say which one is the fullest|find the fullest row].",
            "Can you explain the layout of the [image|picture] in detail?",
        )
    )
    counts = [
        sum(i.cell // 3 == r for i in scene.items) + sum(s.row == r for s in scene.signs) for r in range(len(ROWS))
    ]
    best = counts.index(max(counts))
    alone = counts.count(counts[best]) == 1
    ending = w.say(
        "[The {row} row has the most|So the fullest row is the {row} one], with {n}."
        if alone
        else "[No row has more than|So no row is fuller than] the {row} one, with {n}.",
        row=ROWS[best],
        n=counted(counts[best], "thing"),
    )
    opening = w.say("[Sure, here is|Of course, here is|Here is] the [layout|arrangement][.| from top to bottom.]")
    facts = tuple(("shape", i.name) for i in scene.items) + tuple(("word", s.word) for s in scene.signs)
    return Turn(question, f"{opening} {by_rows(scene, w)} {ending}", facts)


def _explain_chart(scene: Scene, w: Wording) -> Turn:
    question = w.ask(
        (
            "[Rank|Sort] the bars from the tallest to the shortest and explain.",
            "Which bars stand out? [Explain|Explain your answer] with the values.",
            "Can you compare the bars [in detail|with each other]?",
        )
    )
    ranked = sorted(scene.bars, key=lambda b: -b.value)
    high, low = ranked[0], ranked[-1]
    order = listed([f"{b.colour} with {b.value}" for b in ranked])
    answer = " ".join(
        (
            w.say(
                "[Sure.|Of course.|Gladly.] [From the tallest to the shortest|In order of height], the bars are {o}.",
                o=order,
            ),
            w.say(
                "[The {a} bar stands out|The {a} bar is the highest] [because|since] it reaches {x}, "
                "while {b} is [only|just] at {y}.",
                a=high.colour,
                b=low.colour,
                x=high.value,
                y=low.value,
            ),
            w.say("[The gap between them is|That is a difference of] {d}.", d=high.value - low.value),
        )
    )
    return Turn(question, answer, tuple(("bar", f"{b.colour} {b.value}") for b in scene.bars))


def write(scene: Scene, rng: random.Random) -> Turn:
    """Last turn: a small story or a report, built around what is in the image."""
    w = Wording(rng)
    if scene.bars:
        return _report(scene, w)
    hero, friend = scene.items[0], scene.items[-1]
    question = w.ask(
        (
            "[Write|Tell me] a short story about [this picture|these shapes].",
            "[Invent|Make up] a [small|little] tale about the {hero}.",
            "Now turn the [image|picture] into a story for children.",
        ),
        hero=hero.name,
    )
    lines = [
        w.say(
            "[Once upon a time|Long ago|One day], {hero} lived in the {place} of a [quiet|bright|small] page.",
            hero=article(hero.name),
            place=hero.position,
        ),
        w.say(
            "[Every morning|Each day] it [looked around|woke up] and [dreamed of|longed for] [a friend|the wide world]."
        ),
    ]
    if scene.signs:
        lines.append(
            w.say(
                'It [often|always] [looked at|wondered about] the {colour} sign that said "{word}".',
                colour=scene.signs[0].colour,
                word=scene.signs[0].word,
            )
        )
    if friend is not hero:
        lines.append(
            w.say(
                "[Then|One evening|At last] it [met|saw] {friend} in the {place}, "
                "and [they smiled at each other|the two began to talk].",
                friend=article(friend.name),
                place=friend.position,
            )
        )
        lines.append(
            w.say('"[Come and play with me|Shall we travel together]," said the {friend}.', friend=friend.name)
        )
    lines.append(
        w.say(
            "They [raced|danced|wandered] [across the white space|from one corner to the other] until "
            "[the sun went down|the stars came out]."
        )
    )
    lines.append(
        w.say(
            "[From that day on|After that], the {hero} was never [lonely|sad] again, "
            "and [the whole page|everything] [seemed|felt] a little brighter.",
            hero=hero.name,
        )
    )
    return Turn(question, " ".join(lines), (("shape", hero.name), ("position", hero.position)))


def _report(scene: Scene, w: Wording) -> Turn:
    ranked = sorted(scene.bars, key=lambda b: -b.value)
    total = sum(b.value for b in scene.bars)
    question = w.ask(
        (
            "[Write|Draft] a short report about the chart.",
            "Summarise the chart [for my boss|for a meeting].",
            "Turn the [numbers|chart] into a [short|small] text for a newspaper.",
        )
    )
    lines = [
        w.say(
            "[Here is the report.|Report:|Here is a summary.] [The chart compares|We compared] {n} groups.",
            n=NUMBERS[len(ranked)],
        ),
        w.say(
            "[The best result|The highest value] was [reached|achieved] by the {c} group, with {v} points.",
            c=ranked[0].colour,
            v=ranked[0].value,
        ),
        w.say(
            "[In second place|Next] came the {c} group with {v} points.",
            c=ranked[1].colour,
            v=ranked[1].value,
        ),
        w.say(
            "[At the other end|At the bottom], the {c} group [reached|got] [only|just] {v}.",
            c=ranked[-1].colour,
            v=ranked[-1].value,
        ),
        w.say("[Taken together|In total], the bars [add up to|sum to] {t}.", t=total),
        w.say(
            "[We should|The team should] [learn from|look closely at] the {c} group "
            "and [help|support] the {d} group [to improve|next time].",
            c=ranked[0].colour,
            d=ranked[-1].colour,
        ),
    ]
    return Turn(question, " ".join(lines), (("bar", str(ranked[0].value)), ("colour", ranked[0].colour)))


def everything(scene: Scene, rng: random.Random) -> Turn:
    """The long single turn: description, explanation and story in one answer."""
    w = Wording(rng)
    question = w.ask(
        (
            "Describe the [image|picture], explain how it is arranged, and finish with a short text about it.",
            "[Write|Give me] a long [answer|text] about this [image|picture]: "
            "what is there, how it is ordered, and a story.",
            "Tell me everything about this [image|picture], and end with [something creative|a short story].",
        )
    )
    parts = [describe(scene, w), explain(scene, rng).answer, write(scene, rng).answer]
    return Turn(question, " ".join(parts), item_facts(scene))


def conversation(scene: Scene, rng: random.Random) -> list[Turn]:
    """The turns of one record: three in ten have a single long turn, as in MMSpec."""
    form = rng.random()
    if form < 0.3:
        return [everything(scene, rng)]
    if form < 0.6:
        return [maker(scene, rng) for maker in rng.choice(((look, explain), (look, write), (explain, write)))]
    return [maker(scene, rng) for maker in (look, explain, write)]
