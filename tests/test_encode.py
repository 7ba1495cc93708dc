"""Encoding within a longest length: whole pictures, marks of what was written, and a reason for what is refused."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmspec.losses import valid_pairs
from mmspec.records import RecordError
from mmspec.targets.base import HFTarget
from tests import chats, families
from train.corpus import Picture, Sample
from train.encode import encode, fitted, shown
from train.regenerate import Dialogue

every_family = pytest.mark.parametrize("family", families.FAMILIES)


def picture(number: int) -> Picture:
    file = io.BytesIO()
    families.image(number, families.SIZES[number % len(families.SIZES)]).save(file, "PNG")
    return Picture(f"1#{number}", data=file.getvalue())


SAMPLE = Sample(
    id="s",
    pictures=tuple(map(picture, range(4))),
    turns=("<image>\nw1 w2 w3", "w4", "w5 <image> <image> w6", "w7 w8", "<image> w9"),
    answers=("w10 w11 w12", "w13 w14", "w15 w16 w17 w18", "w19 w20 w21", "w22 w23"),
    file=Path("d.json"),
    line=1,
)
DIALOGUE = Dialogue(SAMPLE.answers, (True,) * 5, 0)


@every_family
def test_at_every_limit_pictures_are_whole_and_marks_are_those_of_the_whole(family: str):
    target = families.build(family)
    whole, marks = encode(SAMPLE, DIALOGUE, target, 10**6)
    counts = pictures_of(target)
    ends = [int((marks == number).nonzero()[-1]) + 1 for number in range(1, 6)]
    lengths, refused = set(), []
    for limit in range(1, len(whole) + 2):
        try:
            prompt, answer = encode(SAMPLE, DIALOGUE, target, limit)
        except RecordError:
            refused.append(limit)
            continue
        n = len(prompt)
        lengths.add(n)
        assert n <= limit
        assert torch.equal(prompt.input_ids, whole.input_ids[:n])
        assert torch.equal(prompt.visual, whole.visual[:n])
        assert torch.equal(answer, marks[:n])
        assert valid_pairs(answer) > 0
        # As many features as placeholders, of as many pictures as there are, whatever form the pixels have.
        features = target.image_features(prompt.pixels).shape[0]
        assert features == int(prompt.visual.sum())
        assert features in counts
        # Shorter than the limit allows only where a picture would have been cut, and then by whole turns.
        if n < min(limit, len(whole)):
            assert bool(whole.visual[limit:].any())
            turns = int(answer.max())
            assert ends[turns - 1] <= n
            assert bool(whole.visual[ends[turns - 1] : ends[turns]].any())
    first = int((marks == 1).nonzero()[0])
    assert refused == list(range(1, first + 2))
    # Text is cut anywhere.
    assert len(lengths) > int((~whole.visual).sum()) // 3


def pictures_of(target: HFTarget) -> list[int]:
    """Placeholders of the first 1, 3 and 4 pictures: after which a turn ends."""
    alone = [
        int(target.encode(replace(SAMPLE, turns=("<image> w1",)).messages(()), [one.open()]).visual.sum())
        for one in SAMPLE.pictures
    ]
    total = list(itertools.accumulate(alone))
    return [total[0], total[2], total[3]]


@every_family
def test_a_dialogue_is_cut_to_the_turns_whose_pictures_fit(family: str):
    """What `fitted` says is what `encode` gives, then and for the dialogue that it returns."""
    target = families.build(family)
    whole, marks = encode(SAMPLE, DIALOGUE, target, 10**6)
    assert fitted(SAMPLE, DIALOGUE, target, 10**6) == replace(DIALOGUE, length=len(whole))
    third = int((marks == 3).nonzero()[0])
    limit = int(whole.visual[:third].nonzero()[-1])
    cut = fitted(SAMPLE, DIALOGUE, target, limit)
    assert cut.answers == SAMPLE.answers[:2]
    assert cut.finished == (True, True)
    assert len(shown(SAMPLE, DIALOGUE)) == 4
    assert len(shown(SAMPLE, cut)) == 1
    again, answer = encode(SAMPLE, cut, target, limit)
    assert len(again) == cut.length
    assert int(answer.max()) == 2


@pytest.mark.parametrize("name", chats.NAMES)
def test_no_stop_token_is_trained_that_the_target_did_not_write(name: str):
    """Nor is a word of the answer lost where the template shows none."""
    target = chats.build(name)
    words = ("A kite.", "Blue.", "Yes", "white foam")
    sample = replace(SAMPLE, pictures=(), turns=("What?", "And?", "Sure?", "More?"), answers=words)
    for finished in itertools.product((True, False), repeat=4):
        prompt, answer = encode(sample, Dialogue(words, finished, 0), target, 10**6)
        for number, (text, ended) in enumerate(zip(words, finished), start=1):
            ids = prompt.input_ids[answer == number]
            assert target.decode(ids.tolist()).strip() == text
            trained = [int(token) in target.stop_ids for token in ids]
            shows = name != "llava" or number == 4
            assert trained == [False] * (len(ids) - (ended and shows)) + [True] * (ended and shows)


@pytest.mark.parametrize("name", chats.NAMES)
def test_an_answer_cut_at_the_limit_trains_its_words_and_no_stop_token(name: str):
    target = chats.build(name)
    sample = replace(SAMPLE, pictures=(), turns=("What?",), answers=("A red kite flies over the sea.",))
    dialogue = Dialogue(sample.answers, (True,), 0)
    whole, marks = encode(sample, dialogue, target, 10**6)
    places = marks.nonzero().flatten().tolist()
    for limit in places[2:]:
        prompt, answer = encode(sample, dialogue, target, limit)
        assert len(prompt) == limit
        assert torch.equal(answer.nonzero().flatten(), torch.arange(places[0], limit))
        assert not any(int(token) in target.stop_ids for token in prompt.input_ids[places[0] :])
    assert int(whole.input_ids[places[-1]]) in target.stop_ids
    for limit in range(1, places[0] + 2):
        with pytest.raises(RecordError, match=rf"prompt is longer than the context \({limit} tokens\)"):
            encode(sample, dialogue, target, limit)


def test_pictures_that_leave_no_room_are_refused():
    target = families.build("qwen2_vl")
    with pytest.raises(RecordError, match=r"pictures of the first turn are longer than the context \(9 tokens\)"):
        encode(SAMPLE, DIALOGUE, target, 9)


def test_a_conversation_without_a_mark_is_refused():
    """An answer that is cut before its first word: its stop token is the template's, not the target's."""
    target = families.build("llava")
    sample = replace(SAMPLE, pictures=(), turns=("w1",), answers=("",))
    assert int(encode(sample, Dialogue(("",), (True,), 0), target, 99)[1].sum()) == 1
    with pytest.raises(RecordError, match="nothing of the answers was written"):
        encode(sample, Dialogue(("",), (False,), 0), target, 99)


def test_only_pictures_that_are_shown_are_opened():
    """A damaged picture of a turn without an answer costs nothing."""
    broken = replace(SAMPLE, pictures=(*SAMPLE.pictures[:3], Picture("1#3", data=b"no picture")))
    target = families.build("llava")
    first = Dialogue(SAMPLE.answers[:4], (True,) * 4, 0)
    assert torch.equal(encode(broken, first, target, 999)[0].input_ids, encode(SAMPLE, first, target, 999)[0].input_ids)
    with pytest.raises(RecordError, match="1#3"):
        encode(broken, DIALOGUE, target, 999)
