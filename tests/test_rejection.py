"""Sampled text in distribution: the first two tokens of every verifier against exact target probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mmspec.sampling import DRAFT_STREAM, GreedySampler, KeyedSampler, gumbel_noise
from mmspec.tree import chain, from_parents
from mmspec.types import Choices, Proposals, Tree
from mmspec.verify import MatchVerifier, RejectionVerifier

V, DRAWS, ROOT = 6, 30_000, 10
"""Tokens, rows (each its own key), and the position of the root."""


def models(seed: int):
    """Logits [V + 1, V] of a target and of a drafter that is wrong about it: row V after the root, row t after t."""
    torch.manual_seed(seed)
    target = 1.5 * torch.randn(V + 1, V, dtype=torch.float64)
    return target, target + torch.randn(V + 1, V, dtype=torch.float64)


def drawn_trees(drafter: torch.Tensor, widths: tuple[int, ...], sampler: KeyedSampler, declared=None) -> Tree:
    """Sampled trees of one row a key, drawn by the textbook: one multinomial draw after the other, no Gumbel noise.

    Args:
        declared: what the proposals say the candidates were drawn from, if not the truth.
    """
    rng = torch.Generator().manual_seed(1)
    q = sampler.weights(drafter).softmax(-1)
    tokens, parents, rows = [torch.zeros(DRAWS, 1, dtype=torch.long)], [-1], []
    level = [(0, torch.full((DRAWS, 1), V))]
    for width in widths:
        below = []
        for node, token in level:
            rows.append((declared if declared is not None else q)[token[:, 0]])
            left, taken = q[token[:, 0]].clone(), torch.zeros(DRAWS, V, dtype=torch.bool)
            for _ in range(width):
                # Where truncation leaves too few to draw from, any token that no sibling has.
                left = torch.where(left.sum(-1, keepdim=True) > 0, left, (~taken).double())
                drawn = torch.multinomial(left, 1, generator=rng)
                taken = taken.scatter(1, drawn, True)
                left.scatter_(1, drawn, 0.0)
                below.append((len(parents), drawn))
                tokens.append(drawn)
                parents.append(node)
        level = below
    tree = from_parents(torch.cat(tokens, 1), torch.tensor(parents).expand(DRAWS, -1), len(widths))
    return replace(tree, proposals=Proposals(torch.stack(rows, 1), widths))


def choices(target: torch.Tensor, trees: Tree) -> Choices:
    keys = torch.arange(len(trees.tokens))
    last = trees.tokens.index_fill(1, torch.tensor([0]), V)
    return Choices(target[last], keys, ROOT + 1 + trees.depths)


def plain(target, sampler, last, depth):
    """What plain decoding says after the tokens `last` [DRAWS], as token number `depth` behind the root."""
    positions = torch.full((DRAWS, 1), ROOT + depth)
    return sampler.scores(target[last].unsqueeze(1), torch.arange(DRAWS), positions).argmax(-1)[:, 0]


def first_two(accepted, trees, target, sampler):
    """The first two tokens of each row; a row that decided one draws its second in the next, plain round."""
    decided = accepted.tokens
    first = decided[:, 0]
    return first, torch.where(accepted.n_kept > 1, decided[:, 1], plain(target, sampler, first, 2))


def excess(first, second, target, sampler) -> float:
    """Chi-square of the pairs as a normal deviate (Wilson-Hilferty): N(0, 1) where the pairs follow the target."""
    p = sampler.weights(target).softmax(-1)
    expected = (p[V][:, None] * p[:V]).flatten() * len(first)
    observed = torch.bincount(first * V + second, minlength=V * V).double()
    assert observed[expected == 0].sum() == 0
    cells = expected > 5
    freedom = int(cells.sum()) - 1
    ratio = float(((observed - expected)[cells] ** 2 / expected[cells]).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


SHAPES = {"chain": (1, 1), "pairs": (2, 2), "triple": (3, 1), "wide": (2, 3)}
SAMPLERS = {"free": KeyedSampler(0.9, seed=4), "truncated": KeyedSampler(1.2, top_k=4, top_p=0.9, seed=5)}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rejection_follows_the_target(shape, sampler):
    """Below 3.5 sigma for a right rule; the same rule fed with a wrong q is beyond 20."""
    target, drafter = models(3)
    draw, widths = SAMPLERS[sampler], SHAPES[shape]
    trees = drawn_trees(drafter, widths, draw)
    told = choices(target, trees)
    scores = draw.scores(told.logits, told.keys, told.positions)
    accepted = RejectionVerifier(draw).accept(trees, scores, told)
    assert excess(*first_two(accepted, trees, target, draw), target, draw) < 3.5
    wrong = drawn_trees(drafter, widths, draw, declared=draw.weights(target).softmax(-1))
    mistaken = RejectionVerifier(draw).accept(wrong, scores, told)
    assert excess(*first_two(mistaken, wrong, target, draw), target, draw) > 20


@pytest.mark.parametrize("widths", [(1, 1), (2, 2)], ids=str)
def test_noise_that_draws_has_no_part_in_accepting(widths):
    """Candidates drawn with keyed noise, as heads do: right as long as no stream of noise is used twice."""
    target, drafter = models(3)
    draw = SAMPLERS["free"]
    tokens, parents, level, rows = [torch.zeros(DRAWS, dtype=torch.long)], [-1], [(0, torch.full((DRAWS,), V))], []
    for depth, width in enumerate(widths):
        positions, below = torch.full((DRAWS, 1), ROOT + 1 + depth), []
        noise = gumbel_noise(draw.seed, torch.arange(DRAWS), positions, V, torch.float64, DRAFT_STREAM)[:, 0]
        for node, token in level:
            weights = draw.weights(drafter[token])
            rows.append(weights.softmax(-1))
            for candidate in (weights + noise).topk(width, dim=-1).indices.unbind(1):
                below.append((len(parents), candidate))
                tokens.append(candidate)
                parents.append(node)
        level = below
    trees = from_parents(torch.stack(tokens, 1), torch.tensor(parents).expand(DRAWS, -1), len(widths))
    trees = replace(trees, proposals=Proposals(torch.stack(rows, 1), widths))
    told = choices(target, trees)
    accepted = RejectionVerifier(draw).accept(trees, told.logits, told)
    assert excess(*first_two(accepted, trees, target, draw), target, draw) < 3.5


def test_chosen_candidates_under_the_rejection_rule_are_not_the_target():
    """Why they are refused: the best tokens of q, verified as if they had been drawn, tilt the text."""
    target, drafter = models(3)
    draw = SAMPLERS["free"]
    q = draw.weights(drafter).softmax(-1)
    best = q.argmax(-1)
    tokens = torch.stack([torch.tensor(0), best[V], best[best[V]]]).expand(DRAWS, 3)
    chosen = chain(tokens)
    told = choices(target, chosen)
    scores = draw.scores(told.logits, told.keys, told.positions)
    with pytest.raises(ValueError, match="needs sampled trees"):
        RejectionVerifier(draw).accept(chosen, scores, told)
    posing = replace(
        chosen, proposals=Proposals(q[torch.stack([torch.tensor(V), best[V]])].expand(DRAWS, 2, V), (1, 1))
    )
    accepted = RejectionVerifier(draw).accept(posing, scores, told)
    assert excess(*first_two(accepted, posing, target, draw), target, draw) > 20


def assert_plain(first, second, target, sampler):
    """The same noise at the same position: plain decoding's tokens, not merely their like."""
    assert torch.equal(first, plain(target, sampler, torch.full((DRAWS,), V), 1))
    assert torch.equal(second, plain(target, sampler, first, 2))


@pytest.mark.parametrize("sampler", [KeyedSampler(0.7), KeyedSampler(1.3, top_k=4), KeyedSampler(1.0, top_p=0.8)])
def test_matching_follows_the_target_whatever_is_offered(sampler):
    """A tree that offers some first tokens and not others does not tilt the pair."""
    target, _ = models(0)
    trees = from_parents(torch.tensor([0, 1, 4]).expand(DRAWS, 3), torch.tensor([-1, 0, 0]).expand(DRAWS, 3), 1)
    told = choices(target, trees)
    scores = sampler.scores(told.logits, told.keys, told.positions)
    first, second = first_two(MatchVerifier().accept(trees, scores, told), trees, target, sampler)
    assert excess(first, second, target, sampler) < 3.5
    assert_plain(first, second, target, sampler)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_matching_follows_the_target_where_candidates_share_its_noise(share):
    """Candidates chosen with the noise that decides: exact, and plain decoding's own tokens."""
    target, drafter = models(3)
    draw = SAMPLERS["free"]
    keys = torch.arange(DRAWS)
    tokens, parents, level = [torch.zeros(DRAWS, dtype=torch.long)], [-1], [(0, torch.full((DRAWS,), V))]
    for depth in range(2):
        noise = gumbel_noise(draw.seed, keys, torch.full((DRAWS, 1), ROOT + 1 + depth), V, torch.float64)[:, 0]
        below = []
        for node, token in level:
            for candidate in (draw.weights(drafter[token]) + share * noise).topk(2, dim=-1).indices.unbind(1):
                below.append((len(parents), candidate))
                tokens.append(candidate)
                parents.append(node)
        level = below
    trees = from_parents(torch.stack(tokens, 1), torch.tensor(parents).expand(DRAWS, -1), 2)
    told = choices(target, trees)
    scores = draw.scores(told.logits, told.keys, told.positions)
    first, second = first_two(MatchVerifier().accept(trees, scores, told), trees, target, draw)
    assert excess(first, second, target, draw) < 3.5
    assert_plain(first, second, target, draw)
    # The candidates themselves are no samples of the target: emitted unverified they would show.
    assert excess(trees.tokens[:, 1], trees.tokens[:, 3], target, draw) > 20


def test_a_perfect_proposal_is_always_accepted_and_a_disjoint_one_never():
    target, _ = models(3)
    draw = SAMPLERS["free"]
    trees = drawn_trees(target, (1, 1), draw)
    told = choices(target, trees)
    scores = draw.scores(told.logits, told.keys, told.positions)
    assert (RejectionVerifier(draw).accept(trees, scores, told).n_kept == 3).all()
    blind = target.masked_fill(torch.arange(V) == 2, -math.inf)
    only = torch.full_like(target, -math.inf).masked_fill(torch.arange(V) == 2, 0.0)
    trees = drawn_trees(only, (1,), draw)
    told = choices(blind, trees)
    accepted = RejectionVerifier(draw).accept(trees, told.logits, told)
    assert (accepted.n_kept == 1).all()
    assert (accepted.next_tokens != 2).all()


def test_rows_without_nodes_and_rows_cut_by_a_budget_get_plain_samples():
    """Padding (parents -1) has no say: a row that drafted nothing decides one token, by p alone."""
    target, drafter = models(5)
    draw = SAMPLERS["free"]
    trees = drawn_trees(drafter, (2, 2), draw)
    bare = from_parents(trees.tokens, torch.full_like(trees.parents, -1), 2)
    bare = replace(bare, proposals=trees.proposals)
    told = choices(target, bare)
    accepted = RejectionVerifier(draw).accept(bare, told.logits, told)
    assert (accepted.n_kept == 1).all()
    assert excess(*first_two(accepted, bare, target, draw), target, draw) < 3.5
    # Two of six nodes: a tree of one level, whose second token is a bonus.
    cut = trees.parents.masked_fill(torch.arange(7) > 2, -1)
    cut = replace(from_parents(trees.tokens, cut, 2), proposals=trees.proposals)
    told = choices(target, cut)
    accepted = RejectionVerifier(draw).accept(cut, told.logits, told)
    assert int(accepted.n_kept.max()) == 2
    assert excess(*first_two(accepted, cut, target, draw), target, draw) < 3.5


def test_greedy_decoding_has_nothing_to_reject():
    with pytest.raises(ValueError, match="needs a KeyedSampler, got GreedySampler"):
        RejectionVerifier(GreedySampler())


def test_streams_of_noise_are_independent():
    """Correlation of 60,000 pairs below 5 sigma, and no stream is a shift of the samplers' own."""
    keys, positions = torch.arange(100), torch.arange(100).expand(100, 100)
    own = gumbel_noise(1, keys, positions, V, torch.float64).flatten()
    other = gumbel_noise(1, keys, positions, V, torch.float64, DRAFT_STREAM).flatten()
    assert abs(float(torch.corrcoef(torch.stack([own, other]))[0, 1])) < 5 / math.sqrt(len(own))
    assert not torch.isin(own, other).any()
