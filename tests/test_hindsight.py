"""The oracle of policies: what a record of the largest draft says of smaller ones, and the best choice by hand."""

from __future__ import annotations

import pytest

from mmspec.drafters.null import NullDrafter
from mmspec.hindsight import Outcome, Prices, Recorder, fixed_rate, oracle_rate
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.types import Plan
from tests.drafters import HEADS, Scripted, known_answers
from tests.test_policies import requests
from tests.tiny import llava


class Shorter(FixedPolicy):
    """A chain of four, but `depth` levels in round `at`."""

    def __init__(self, at, depth):
        super().__init__(4, 4)
        self.at, self.depth, self.round = at, depth, -1

    def plan(self, sensed, remaining):
        self.round += 1
        full = super().plan(sensed, remaining)
        depth = min(self.depth, full.depth)
        return Plan(depth, full.budget if depth else (0,) * len(remaining)) if self.round == self.at else full


def test_a_shorter_chain_accepts_what_the_record_of_the_longer_one_says():
    """Against decoding itself: every round of an answer is drafted again, from the same root, as deep as 0 to 3."""
    target = llava()
    wanted = requests(target, 1, 24)
    known = known_answers(wanted, generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler()))
    vocab = target.shape.vocab_size
    recorder = Recorder(Scripted(known, lambda true, depth: true if (true + depth) % 7 else (true + 1) % vocab, vocab))
    [whole] = generate(target, wanted, recorder, FixedPolicy(4, 4), GreedySampler())
    assert recorder.rows == 1
    seen = set()
    for at, [outcome] in enumerate(recorder.steps):
        for depth in range(4):
            [again] = generate(target, wanted, recorder.drafter, Shorter(at, depth), GreedySampler())
            assert again.rounds[:at] == whole.rounds[:at]
            accepted = again.rounds[at][2]
            assert accepted == outcome.accepted(depth, depth)
            seen.add((depth, accepted))
    assert {accepted for _, accepted in seen} == {0, 1, 2, 3}


def test_the_record_of_a_tree_says_how_deep_its_best_nodes_reach():
    """By hand: what is accepted is found among the first nodes of those no deeper than the draft."""
    outcome = Outcome((2, 3), (1, 1, 2, 2, 3))
    assert [outcome.accepted(d, n) for d, n in ((0, 5), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3))] == [0, 0, 1, 1, 2, 2]
    assert Outcome((1, 3), (1, 2, 2, 1)).accepted(2, 2) == 1
    target = llava()
    recorder = Recorder(HEADS["eagle"](target).double().drafter(target, 2))
    outputs = generate(target, requests(target, 2, 16), recorder, FixedPolicy(4, 8), GreedySampler(), max_batch=2)
    assert [output.error for output in outputs] == [None, None]
    assert recorder.rows == 2
    assert recorder.steps
    for row in (row for step in recorder.steps for row in step):
        assert row.accepted(4, 8) == len(row.path)
        for depth in range(5):
            counts = [row.accepted(depth, n) for n in range(9)]
            assert counts == sorted(counts)
            assert counts[-1] == min(depth, len(row.path))


def test_the_oracle_is_the_best_choice_by_hand_and_beats_every_fixed_draft():
    """Half the rounds accept nothing, half three tokens at ranks 1, 2, 3; a node costs 0.1, a level 0.2, a pass 1."""
    prices = Prices(tuple(1 + 0.1 * n for n in range(5)), tuple(0.2 * d for d in range(4)))
    good, bad = Outcome((1, 2, 3), (1, 2, 3, 3)), Outcome((), (1, 2, 3, 3))
    steps = [((good,), prices), ((bad,), prices)] * 10
    assert oracle_rate(steps) == pytest.approx((4 + 1) / (1.3 + 0.6 + 1.0))
    fixed = [fixed_rate(steps, d, n) for d in range(4) for n in range(5) if (d > 0) == (n > 0)]
    assert fixed_rate(steps, 0, 0) == pytest.approx(1.0)
    assert fixed_rate(steps, 3, 3) == pytest.approx(5 / (2 * 1.9))
    assert oracle_rate(steps) > max(fixed)
    dear = Prices(tuple(1 + 2.0 * n for n in range(5)), prices.draft_s)
    assert oracle_rate([(step, dear) for step, _ in steps]) == pytest.approx(1.0), "where nothing pays, it skips"
    both = [((good,), prices), ((good,), dear)]
    assert fixed_rate(both, 3, 3) == pytest.approx(8 / (1.9 + 7.6)), "each step at the prices of its own batch"
