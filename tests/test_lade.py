"""Lookahead decoding: window and pool against a slow version of the algorithm, and the tree that both are put into."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.drafters.lade import ABSENT, Config, LadeDrafter, make
from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.types import Forward, Plan, Prompt, Request, Round
from tests.drafters import Erratic
from tests.tiny import VOCAB, llava, prompt

SMALL = Config(ngram=3, window=3, guesses=2)


def policy(config):
    return FixedPolicy(config.depth, config.budget)


class Sparing(FixedPolicy):
    """Leaves out n-grams, or a row altogether, at random."""

    def open(self, max_batch, device, sampled=False):
        self.rng = random.Random(0)

    def plan(self, sensed, remaining):
        full = super().plan(sensed, remaining)
        return Plan(full.depth, tuple(b and self.rng.choice([0, SMALL.window_nodes + 1, b]) for b in full.budget))


def requests(target, n=7, new=24):
    """More than a batch, ragged: no image, one, two."""
    return [Request(f"r{i}", prompt(target, i, 3 + i % 5, images=i % 3), new - i % 4, key=17 * i) for i in range(n)]


class Slow:
    """The algorithm for one request as its paper tells it: lists and dictionaries, and a whole forward pass a guess.

    Args:
        levels: [N - 1][W], the window to start with.
    """

    def __init__(self, target, config, asked, root, levels):
        self.target, self.config, self.request = target, config, asked
        self.answer, self.levels, self.passes, self.pool = [root], levels, 0, {}

    def chosen(self, guesses):
        """The target's choice after the answer so far and some guesses, without any cache."""
        start = self.request.prompt
        more = torch.tensor(self.answer + guesses)
        ids = torch.cat([start.input_ids, more])
        visual = torch.cat([start.visual, torch.zeros(len(more), dtype=torch.bool)])
        state = self.target.open(1, len(ids))
        return int(self.target.prefill(state, 0, Prompt(ids, visual, start.pixels)).logits[0, -1].argmax())

    def read(self):
        """One pass over the window."""
        levels = self.levels
        levels[0][0] = self.answer[-1]
        new = []
        for i in range(self.config.window):
            token = self.chosen(levels[0][1 : i + 1] + [level[i] for level in levels[1:]])
            new.append(levels[-1][i] if token == self.target.image_token_id else token)
        grams = [tuple(level[i] for level in [*levels, new]) for i in range(self.config.window)]
        if self.passes >= self.config.ngram - 2:
            for first, *rest in grams:
                held = self.pool.setdefault(first, [])
                if first != self.target.image_token_id and rest not in held:
                    held.append(rest)
        for held in self.pool.values():
            del held[: -self.config.guesses]
        self.levels, self.passes = [*levels[1:], new], self.passes + 1


class Compared(LadeDrafter):
    """A drafter that is compared with the slow version after each round."""

    def open(self, max_batch, max_tokens):
        super().open(max_batch, max_tokens)
        self.slow, self.compared = [None] * max_batch, 0

    def admit(self, row, request, forward, root):
        super().admit(row, request, forward, root)
        self.slow[row] = Slow(self.target, self.config, request, int(root), self.window[row].tolist())

    def observe(self, round):
        window_was_read = self.asked is not None and self.asked[1]
        super().observe(round)
        for row, tokens in enumerate(round.tokens):
            slow = self.slow[row]
            if not tokens:
                continue
            if window_was_read and window_was_read[row]:
                slow.read()
            assert self.window[row, 1:].tolist() == slow.levels[1:]
            assert self.window[row, 0, 1:].tolist() == slow.levels[0][1:]
            assert self.held(row) == {first: sorted(held) for first, held in slow.pool.items() if held}
            slow.answer += tokens
            self.compared += bool(slow.pool)

    def held(self, row):
        """{first token: the n-grams' other tokens, sorted}."""
        vocab, found = self.target.shape.vocab_size, {}
        for first, grams in enumerate(self.pool[row * vocab : (row + 1) * vocab].tolist()):
            kept = [gram for gram in grams if gram[0] != ABSENT]
            assert all((ABSENT in gram) == (gram[0] == ABSENT) for gram in grams)
            if kept:
                found[first] = sorted(kept)
        return found


@pytest.mark.parametrize(
    ("config", "plans"),
    [
        (SMALL, policy),
        (Config(ngram=4, window=3, guesses=1), policy),  # more columns than places: within a round the last stay
        (Config(ngram=2, window=4, guesses=3), policy),  # plain Jacobi decoding: level 0 alone
        (Config(ngram=4, window=1, guesses=2), policy),
        (SMALL, lambda config: Sparing(config.depth, config.budget)),
    ],
    ids=["small", "crowded", "jacobi", "one_column", "sparing"],
)
def test_window_and_pool_are_those_of_the_slow_version(config, plans):
    """Reads every guess with a forward pass of its own: the window's mask and positions are the algorithm's."""
    target = llava()
    drafter = Compared(config, target)
    outputs = generate(target, requests(target, 3, 14), drafter, plans(config), GreedySampler(), max_batch=2)
    assert [o.error for o in outputs] == [None] * 3
    assert drafter.compared > 5


def filled(config, window, pool, roots):
    """A drafter of the tiny target with this window [B, N - 1, W] and these n-grams behind each row's root."""
    target = llava()
    drafter = LadeDrafter(config, target)
    drafter.open(len(roots), 64)
    drafter.passes = [9] * len(roots)
    drafter.window = torch.tensor(window)
    for row, (root, grams) in enumerate(zip(roots, pool)):
        for slot, gram in enumerate(grams):
            drafter.pool[row * VOCAB + root, slot] = torch.tensor(gram, dtype=torch.int32)
    return drafter


def lines(tree, row):
    """{path of tokens behind the root: node} of the nodes that count; checks that no path comes twice."""
    found = {(): 0}
    place = {0: ()}
    for node, (token, parent) in enumerate(zip(tree.tokens[row].tolist(), tree.parents[row].tolist())):
        if parent >= 0:
            place[node] = (*place[parent], token)
            assert place[node] not in found, "siblings have distinct tokens"
            found[place[node]] = node
            assert int(tree.depths[row, node]) == len(place[node])
    return found


TOKENS = st.integers(3, 5)  # few, so that paths often coincide


@st.composite
def states(draw):
    config = Config(draw(st.integers(2, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    levels = config.ngram - 1
    rows = draw(st.integers(1, 2))
    window = [[[draw(TOKENS) for _ in range(config.window)] for _ in range(levels)] for _ in range(rows)]
    pool = [
        [[draw(TOKENS) for _ in range(levels)] for _ in range(draw(st.integers(0, config.guesses)))]
        for _ in range(rows)
    ]
    return config, window, pool, [draw(TOKENS) for _ in range(rows)]


@given(states())
@settings(max_examples=150, deadline=None)
def test_every_guess_is_one_node_of_the_tree(state):
    """Window and n-grams as paths, by hand, are the tree's paths; equal ones are one node, which is the one read."""
    config, window, pool, roots = state
    with torch.inference_mode():
        drafter = filled(config, window, pool, roots)
        tree = drafter.propose(torch.tensor(roots), Plan(config.depth, (config.budget,) * len(roots)))
        read, moves = drafter.asked
    assert all(moves)
    for row in range(len(roots)):
        found, wanted = lines(tree, row), {()}
        for i in range(config.window):
            line = tuple(window[row][0][1 : i + 1])
            wanted.add(line)
            for level in window[row][1:]:
                line = (*line, level[i])
                wanted.add(line)
            assert int(read[row, i]) == found[line]
        for gram in pool[row]:
            wanted |= {tuple(gram[:n]) for n in range(1, len(gram) + 1)}
        assert set(found) == wanted


def test_pooled_ngrams_are_dropped_before_the_window():
    config = Config(ngram=3, window=2, guesses=2)
    window = [[[7, 8], [9, 10]]] * 2
    pool = [[[11, 12], [13, 14]]] * 2
    with torch.inference_mode():
        drafter = filled(config, window, pool, [7, 7])
        tree = drafter.propose(torch.tensor([7, 7]), Plan(config.depth, (config.budget, config.window_nodes + 1)))
        assert drafter.asked[1] == [True, True]
        window_lines = {(), (8,), (9,), (8, 10)}
        assert set(lines(tree, 0)) == window_lines | {(11,), (11, 12), (13,), (13, 14)}
        assert set(lines(tree, 1)) == window_lines | {(11,)}
        tree = drafter.propose(torch.tensor([7, 7]), Plan(config.depth, (2, 0)))
        assert drafter.asked is None
        assert tree.tokens.shape == (2, 3)
        assert set(lines(tree, 0)) == {(), (8,), (9,)}
        assert set(lines(tree, 1)) == {()}
        tree = drafter.propose(torch.tensor([7, 7]), Plan(1, (config.budget,) * 2))
        assert drafter.asked is None
        assert set(lines(tree, 0)) == {(), (8,), (9,), (11,), (13,)}
        assert tree.max_depth == 1
        assert drafter.propose(torch.tensor([7, 7]), Plan(config.depth, (0, 0))).tokens.shape == (2, 1)


def observed(drafter, plan, roots, choices):
    """One round in which the target chooses `choices[token]` after a token, whatever came before."""
    tree = drafter.propose(torch.tensor(roots), plan)
    logits = torch.nn.functional.one_hot(torch.tensor(choices)[tree.tokens], VOCAB).double()
    rows = ((0,),) * len(roots)
    drafter.observe(Round(tree, Forward(logits, logits), None, rows, rows))


def test_a_window_that_was_not_read_stays():
    config = Config(ngram=3, window=2, guesses=2)
    window = [[[7, 8], [9, 10]]] * 2
    choices = [(token + 1) % VOCAB for token in range(VOCAB)]
    with torch.inference_mode():
        drafter = filled(config, window, [[], []], [7, 7])
        observed(drafter, Plan(config.depth, (config.budget, 0)), [7, 7], choices)
        assert drafter.window.tolist() == [[[9, 10], [10, 11]], window[1]]
        assert drafter.passes == [10, 9]
        assert drafter.pool[7].tolist() == [[9, 10], [ABSENT] * 2]
        assert (drafter.pool[VOCAB : 2 * VOCAB] == ABSENT).all()


def test_placeholders_are_neither_drawn_nor_kept():
    target = llava()
    image = target.image_token_id
    config = Config(ngram=3, window=2, guesses=2)
    with torch.inference_mode():
        drafter = make(config, target)
        drafter.open(1, 64)
        one = Request("r", prompt(target, 1, 5, images=2), 9, key=-5)
        drafter.admit(0, one, None, torch.tensor(5))
        text = one.prompt.input_ids[~one.prompt.visual].tolist()
        assert set(drafter.window.flatten().tolist()) <= set(text) - {image}
        nothing = Prompt(torch.tensor([image]), torch.tensor([True]))
        drafter.admit(0, Request("r", nothing, 9), None, torch.tensor(5))
        assert image not in drafter.window
        for root in (5, image, 5, image):  # a target that says nothing but images, and starts from one
            observed(drafter, Plan(config.depth, (config.budget,)), [root], [image] * VOCAB)
        assert image not in drafter.window[:, 1:]
        assert image not in drafter.pool[:-1]
        assert (drafter.pool[image] == ABSENT).all(), "nothing is looked up by a placeholder"


def test_what_a_row_starts_from_is_its_request_alone():
    target = llava()
    one = Request("r", prompt(target, 1, 5), 9, key=3)
    with torch.inference_mode():
        drafter = make(SMALL, target)
        drafter.open(2, 64)
        drafter.admit(0, one, None, torch.tensor(5))
        drafter.admit(1, one, None, torch.tensor(5))
        drafter.pool[:VOCAB] = 7
        assert torch.equal(drafter.window[0], drafter.window[1])
        drafter.evict(0)
        drafter.admit(0, one, None, torch.tensor(5))
        assert torch.equal(drafter.window[0], drafter.window[1])
        assert (drafter.pool[:VOCAB] == ABSENT).all(), "n-grams of the request before"


@pytest.mark.parametrize("sampler", [GreedySampler(), KeyedSampler(0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("config", [SMALL, Config(ngram=4, window=4, guesses=3)], ids=["small", "larger"])
def test_the_output_is_plain_decodings(sampler, config):
    target = llava()
    wanted = requests(target)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), sampler)
    drafter = make(config, target)
    for plans in (policy(config), Erratic(config.depth, config.budget)):
        for batch in (1, 3):
            got = generate(target, wanted, drafter, plans, sampler, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain]
            assert not any(o.error for o in got)


def test_guesses_are_accepted():
    """A tied target soon repeats itself, which is what n-grams are for."""
    target = llava(tie=True, head_dim=12)
    config = Config(ngram=4, window=4, guesses=4)
    outputs = generate(target, requests(target, 4, 40), make(config, target), policy(config), GreedySampler())
    rounds = [r for o in outputs for r in o.rounds]
    assert sum(accepted for _, _, accepted, _ in rounds) > len(rounds) / 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"ngram": 1}, "ngram must be at least 2, got 1"),
        ({"window": 0}, "got 0 and 7"),
        ({"guesses": 0}, "got 7 and 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        Config(**config)
