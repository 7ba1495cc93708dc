"""Text first, pictures later: what a step draws depends on the step alone."""

from __future__ import annotations

from collections import Counter

import pytest

from mmspec.types import InputError
from train.curriculum import Curriculum, picture_share

PICTURED = [index % 3 == 0 for index in range(60)]


def curriculum(steps=100, text_first=0.5, weights=(1.0,) * 60):
    return Curriculum(weights, PICTURED, 7, steps, text_first)


def test_the_share_is_nothing_at_first_and_everything_at_last():
    shares = [picture_share(step, 101, 0.5) for step in range(101)]
    assert shares[:51] == [0.0] * 51
    assert shares[75] == pytest.approx(0.5)
    assert shares[100] == 1.0
    assert shares == sorted(shares)
    assert picture_share(0, 1, 0.5) == 0.0
    assert picture_share(50, 101, 0.0) == pytest.approx(0.5)


def test_batches_follow_the_share():
    order = curriculum()
    shown = [sum(PICTURED[index] for index in order.batch(step, 16)) for step in range(100)]
    assert not any(shown[:50])
    assert shown[99] == 16
    assert sum(shown[50:]) == pytest.approx(16 * 50 / 2, rel=0.1)


def test_a_step_is_the_same_whoever_asks_and_whenever():
    """A resumed run, or one of other processes, begins in the middle."""
    order = curriculum()
    told = [order.batch(step, 8) for step in range(100)]
    for step in (80, 3, 99, 0, 51):
        assert curriculum().batch(step, 8) == order.batch(step, 8) == told[step]


def test_each_kind_is_visited_epoch_after_epoch():
    order = curriculum(steps=400)
    drawn = [index for step in range(400) for index in order.batch(step, 8)]
    for kind in (True, False):
        mine = [index for index in drawn if PICTURED[index] == kind]
        each = sum(shown == kind for shown in PICTURED)
        for start in range(0, len(mine) - each, each):
            assert max(Counter(mine[start : start + each]).values()) == 1


def test_a_weight_of_nothing_is_never_drawn():
    order = curriculum(weights=[0.0 if index < 30 else 1.0 for index in range(60)])
    assert all(index >= 30 for step in range(100) for index in order.batch(step, 8))


@pytest.mark.parametrize("pictured", [True, False])
def test_one_kind_alone_is_refused(pictured):
    with pytest.raises(InputError, match=f"no sample is {'without' if pictured else 'with'} a picture"):
        Curriculum([1.0] * 4, [pictured] * 4, 0, 10, 0.5)
