"""Whatever decides tokens beside the logits (penalties, shared noise, rejection): the output is the target's own."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.heads._drafter import PairDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler, make_sampler
from mmspec.tree import chain, from_parents
from mmspec.types import Plan, Proposals, Request
from mmspec.verify import RejectionVerifier
from tests.drafters import DRAFT_VOCAB, HEADS, drafters, known_answers, make_head
from tests.families import requests
from tests.tiny import VOCAB, llava, prompt

PENALTIES = {"repetition_penalty": 1.05, "no_repeat_ngram": 3}
SAMPLERS = {
    "greedy": make_sampler(0.0, **PENALTIES),
    "sampled": make_sampler(0.8, top_p=0.9, seed=3, **PENALTIES),
}


@pytest.mark.parametrize("sampler", [pytest.param("greedy", marks=pytest.mark.slow), "sampled"])
def test_penalised_text_is_plain_decodings_under_every_drafter(sampler):
    target, draw = llava(), SAMPLERS[sampler]
    wanted = requests(target, 5, 20)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    free = generate(target, wanted, NullDrafter(), SkipPolicy(), make_sampler(0.0 if sampler == "greedy" else 0.8))
    assert [o.tokens for o in plain] != [o.tokens for o in free]  # or nothing was penalised
    for name, drafter in drafters(target, known_answers(wanted, plain)).items():
        for batch in (1, 4):
            got = generate(target, wanted, drafter, FixedPolicy(4, 9), draw, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain], (name, batch)


def head(target, kind="eagle"):
    return make_head(kind, target)


every_head = pytest.mark.parametrize("kind", HEADS)


@every_head
def test_candidates_that_share_the_noise_or_are_drawn_change_no_token(kind):
    """Under MatchVerifier any candidates will do: chosen with the noise that decides, or drawn without it."""
    target, draw = llava(), make_sampler(0.8, top_p=0.9, seed=3, **PENALTIES)
    wanted = requests(target, 6, 24)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    untrained = head(target, kind)
    drafting = {
        "shared": untrained.drafter(target, 3, draw),
        "shared_wholly": PairDrafter(untrained, target, 2, draw, noise_share=1.0),
        "drawn_chain": untrained.drafter(target, 1, draw, widths=(1,)),
        "drawn_tree": untrained.drafter(target, 1, draw, widths=(3, 2)),
    }
    for name, drafter in drafting.items():
        for batch in (1, 4):
            got = generate(target, wanted, drafter, FixedPolicy(3, 8), draw, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain], (name, batch)


class Clone(NullDrafter):
    """Drafts a chain with the target itself and the sampler it was given: what a perfect head would do."""

    def __init__(self, target, sampler):
        self.target, self.sampler = target, sampler

    def open(self, max_batch, max_tokens):
        self.row = [None] * max_batch

    def admit(self, row, request, forward, root):
        self.row[row] = (request, [int(root)])

    def observe(self, round):
        for row, path in enumerate(round.paths):
            if path:
                tokens = [int(round.trees.tokens[row, i]) for i in path[1:]]
                self.row[row][1].extend([*tokens, int(round.accepted.next_tokens[row])])

    def propose(self, roots, plan):
        lines = []
        for b, root in enumerate(roots.tolist()):
            request, said = self.row[b]
            assert said[-1] == root
            wanted = len(said) + plan.depth
            again = Request("r", request.prompt, wanted, request.key)
            tokens = generate(self.target, [again], NullDrafter(), SkipPolicy(), self.sampler)[0].tokens
            line = [root, *tokens[len(said) :]]
            lines.append(line + [0] * (1 + plan.depth - len(line)))
        return chain(torch.tensor(lines))


def test_a_perfect_drafter_needs_the_requests_key_to_be_accepted_whole():
    """The key that `admit` hands over gives the noise of the very position: all is accepted, at any temperature."""
    target, draw = llava(), KeyedSampler(1.5, seed=3)
    wanted = [Request("r", prompt(target, 5), 13, key=99)]
    knows = generate(target, wanted, Clone(target, draw), FixedPolicy(3, 3), draw)[0]
    assert [accepted for _, _, accepted, _ in knows.rounds] == [3, 3, 3]
    guesses = generate(target, wanted, Clone(target, KeyedSampler(1.5, seed=4)), FixedPolicy(3, 3), draw)[0]
    assert guesses.tokens == knows.tokens
    assert sum(accepted for _, _, accepted, _ in guesses.rounds) < 9


@every_head
def test_shared_noise_finds_the_position_it_is_for(kind):
    """A head whose draft equals the target's distribution is agreed with at every depth, by the noise alone.

    The head's logits do not depend on the path, and the target's scores are built from those very logits at the
    positions the loop uses. Over a draft vocabulary each token keeps the noise of its id in the target's.
    """
    target, draw = llava(), KeyedSampler(1.0, seed=8)
    drafter = PairDrafter(head(target, kind), target, 1, draw, noise_share=1.0)
    request = Request("r", prompt(target, 4), 8, key=5)
    with torch.inference_mode():
        forward = target.prefill(target.open(1, 64), 0, request.prompt, drafter.taps)
        root = forward.logits[0, -1].argmax()
        drafter.open(1, 64)
        drafter.admit(0, request, forward, root)
        flat = torch.randn(1, 1, VOCAB if drafter.head.draft_ids is None else DRAFT_VOCAB, dtype=torch.float64)
        drafter.head.logits = lambda states, unembed: flat
        logits = drafter._full(flat)
        tree = drafter.propose(root[None], Plan(4, (4,)))
    positions = len(request.prompt) + torch.arange(1, 5)[None]
    chosen = draw.scores(logits.expand(1, 4, VOCAB), torch.tensor([5]), positions).argmax(-1)
    assert tree.tokens[0, 1:].tolist() == chosen[0].tolist()


@pytest.mark.parametrize("widths", [(1,), (2,), (3, 2)])
@pytest.mark.parametrize("kind", ["eagle", "eagle3_small"])
def test_drawn_candidates_follow_their_proposals(kind, widths):
    """2,000 rows of one prompt: first siblings against q, and the pairs against drawing without replacement."""
    target, rows, top = llava(), 2000, 5
    draw = KeyedSampler(0.7, top_k=top, seed=2)
    drafter = head(target, kind).drafter(target, 1, draw, widths=widths)
    asked = prompt(target, 4, 3, images=0)
    with torch.inference_mode():
        forward = target.prefill(target.open(1, 32), 0, asked, drafter.taps)
        root = forward.logits[0, -1].argmax()
        drafter.open(rows, 16)
        for b in range(rows):
            drafter.admit(b, Request("r", asked, 8, key=b), forward, root)
        tree = drafter.propose(root.expand(rows), Plan(3, (12,) * rows))
    n = widths[0]
    assert tree.parents[0, : n + 1].tolist() == [-1, *[0] * n]
    assert (tree.parents == tree.parents[0]).all()
    q = tree.proposals.probabilities[0, 0]
    if drafter.head.draft_ids is not None:
        outside = torch.ones(VOCAB, dtype=torch.bool).index_fill(0, drafter.head.draft_ids, False)
        assert not q[outside].any()
    assert torch.equal(q.expand(rows, VOCAB), tree.proposals.probabilities[:, 0])
    first, second = tree.tokens[:, 1], tree.tokens[:, min(n, 2)]
    expected, observed = q * rows, torch.bincount(first, minlength=VOCAB)
    cells = expected > 5
    assert observed[expected == 0].sum() == 0
    # Binomial counts, 4.5 sigma each.
    assert ((observed - expected).abs()[cells] < 4.5 * (expected * (1 - q)).sqrt()[cells]).all()
    if n > 1:
        pairs = q[:, None] * q / (1 - q)[:, None]
        pairs.fill_diagonal_(0.0)
        counts = torch.bincount(first * VOCAB + second, minlength=VOCAB**2).reshape(VOCAB, VOCAB)
        assert (counts.diagonal() == 0).all()
        cells = pairs * rows > 5
        assert ((counts - pairs * rows).abs()[cells] < 4.5 * (rows * pairs * (1 - pairs)).sqrt()[cells]).all()
    # Each deeper row of proposals belongs to the token drawn above it: rows with one token agree, others do not.
    below = tree.proposals.probabilities[:, 1]
    for token in first.unique():
        group = below[first == token]
        assert torch.allclose(group, group[:1].expand_as(group), atol=1e-9)
    assert len(below.mul(1e6).round().unique(dim=0)) == len(first.unique())


class Misinformed(RejectionVerifier):
    """Takes the candidates for draws from a flat distribution."""

    def accept(self, trees, scores, choices):
        if trees.proposals is not None:
            flat = torch.full_like(trees.proposals.probabilities, 1 / VOCAB)
            trees = replace(trees, proposals=Proposals(flat, trees.proposals.widths))
        return super().accept(trees, scores, choices)


@pytest.mark.parametrize(
    ("kind", "widths"),
    [
        pytest.param("eagle", (1,), marks=pytest.mark.slow),
        ("eagle", (2, 2)),
        pytest.param("eagle3_small", (2, 2), marks=pytest.mark.slow),
    ],
)
def test_rejection_in_the_loop_follows_the_target(kind, widths):
    """Second and third tokens of 1,500 requests against the target's own probabilities after their first ones."""
    target, n = llava(), 1500
    draw = KeyedSampler(0.5, seed=6)
    asked = prompt(target, 6, 2, images=0)
    wanted = [Request(str(i), asked, 5, key=i) for i in range(n)]
    drafter = head(target, kind).drafter(target, 1, draw, widths=widths)
    with torch.inference_mode():
        state = target.open(1, 128)
        target.prefill(state, 0, asked, ())
        parents, tables = torch.tensor([[-1, *[0] * VOCAB]]), []
        for first in range(VOCAB):
            tree = from_parents(torch.tensor([[first, *range(VOCAB)]]), parents, 1)
            tables.append(draw.weights(target.forward(state, tree, ()).logits)[0].softmax(-1))
    p = torch.stack(tables)  # [first, 0]: of the second token; [first, 1 + second]: of the third

    def excess(verifier):
        """Worse of the two chi-squares as a normal deviate, and the tokens accepted."""
        outputs = generate(target, wanted, drafter, FixedPolicy(3, 8), draw, 250, verifier)
        lines = [o.tokens[:3] for o in outputs if len(o.tokens) >= 3]
        # Answers that stopped early are left out, so probabilities are those of going on.
        first, second, third = torch.tensor(lines).T
        worst = -math.inf
        for chances, seen in ((p[first, 0], second), (p[first, 1 + second], third)):
            if seen is second:
                chances = chances.index_fill(1, torch.tensor(sorted(target.stop_ids)), 0.0)
                chances = chances / chances.sum(1, keepdim=True)
            expected = chances.sum(0)
            cells = expected > 5
            observed = torch.bincount(seen, minlength=VOCAB)
            freedom = int(cells.sum())
            ratio = float(((observed - expected)[cells] ** 2 / expected[cells]).sum()) / freedom
            worst = max(worst, (ratio ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom)))
        return worst, sum(accepted for o in outputs for _, _, accepted, _ in o.rounds)

    right, accepted = excess(RejectionVerifier(draw))
    assert accepted > n / 2  # or nothing was put to the test
    assert right < 3.5
    assert excess(Misinformed(draw))[0] > 7


def test_rejection_ends_answers_like_any_other_verifier():
    target, draw = llava(), KeyedSampler(1.3, seed=2, penalties=SAMPLERS["sampled"].penalties)
    wanted = requests(target, 9, 24)
    drafter = head(target).drafter(target, 1, draw, widths=(2, 2))
    again = [generate(target, wanted, drafter, FixedPolicy(3, 7), draw, 4, RejectionVerifier(draw)) for _ in range(2)]
    assert [o.tokens for o in again[0]] == [o.tokens for o in again[1]]
    for request, output in zip(wanted, again[0]):
        stops = [i for i, t in enumerate(output.tokens) if t in target.stop_ids]
        assert stops in ([], [len(output.tokens) - 1])
        assert len(output.tokens) <= request.max_new_tokens
        assert 1 + sum(r[3] for r in output.rounds) == len(output.tokens)
        line = [*request.prompt.input_ids.tolist(), *output.tokens]
        trigrams = list(zip(line, line[1:], line[2:]))[len(request.prompt) - 2 :]
        assert len(set(trigrams)) == len(trigrams)


def test_chosen_candidates_and_greedy_decoding_are_refused():
    target, draw = llava(), KeyedSampler(1.0)
    wanted = requests(target, 1, 24)
    with pytest.raises(ValueError, match="needs sampled trees"):
        generate(target, wanted, head(target).drafter(target, 2), FixedPolicy(3, 5), draw, 1, RejectionVerifier(draw))
    with pytest.raises(ValueError, match="needs a KeyedSampler"):
        head(target).drafter(target, 2, GreedySampler(), widths=(2,))
    with pytest.raises(ValueError, match="must be at least 1"):
        head(target).drafter(target, 2, draw, widths=(2, 0))
