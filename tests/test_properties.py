"""Batched tensor code against slow references in plain Python: trees, masks, acceptance, commits of ragged batches."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.cache import RaggedKV
from mmspec.sampling import ACCEPT_STREAM, BONUS_STREAM, KeyedSampler, gumbel_noise, uniform_noise
from mmspec.tree import ancestors_of, best_of_pool, from_parents
from mmspec.types import Choices, Proposals
from mmspec.verify import MatchVerifier, RejectionVerifier
from tests.strategies import distinct_siblings, forests, line
from tests.tiny import llava

VOCAB = 5


@given(forests(), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_ancestors_and_depths_are_those_of_walking_up(rows, slack):
    deepest = max(len(line(parents, i)) - 1 for parents in rows for i in range(len(parents)))
    table = torch.tensor(rows)
    tree = from_parents(torch.zeros_like(table), table, max(deepest + slack, 1))
    assert torch.equal(tree.ancestors, ancestors_of(table, max(deepest, 1)))
    for b, parents in enumerate(rows):
        for i in range(len(parents)):
            walked = line(parents, i)
            assert tree.ancestors[b, i].nonzero().flatten().tolist() == sorted(walked)
            assert int(tree.depths[b, i]) == len(walked) - 1


@given(forests(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_node_sees_its_rows_tokens_and_its_own_line(rows, data):
    """The additive mask of a tree pass. A row that holds nothing sees slot 0, or it would turn into NaN."""
    lengths = [data.draw(st.integers(0, 5)) for _ in rows]
    table = torch.tensor(rows)
    kv = RaggedKV(1, len(rows), 1, 16, 1, torch.float64, torch.device("cpu"))
    for b, length in enumerate(lengths):
        kv.set_length(b, length)
    kv.begin_tree(table.shape[1])
    mask = llava()._mask(kv, from_parents(torch.zeros_like(table), table, table.shape[1]))
    offset = max(lengths)
    if mask is None:  # nothing to hide
        mask = torch.zeros(len(rows), 1, table.shape[1], offset + table.shape[1])
    for b, (parents, length) in enumerate(zip(rows, lengths)):
        for node in range(len(parents)):
            past = range(min(max(length, 1), offset))
            seen = [*past, *sorted(offset + i for i in line(parents, node))]
            assert (mask[b, 0, node] == 0).nonzero().flatten().tolist() == seen
    assert ((mask == 0) | (mask == -torch.inf)).all()


@given(forests(), st.data())
@settings(max_examples=150, deadline=None)
def test_acceptance_in_a_ragged_batch_is_the_walk_of_each_row(rows, data):
    """Rows know nothing of each other, and padding is never accepted, whatever token it carries."""
    tokens = [data.draw(distinct_siblings(parents, VOCAB)) for parents in rows]
    choices = [[data.draw(st.integers(0, VOCAB - 1)) for _ in row] for row in tokens]
    tree = from_parents(torch.tensor(tokens), torch.tensor(rows), len(rows[0]))
    accepted = MatchVerifier().accept(tree, torch.nn.functional.one_hot(torch.tensor(choices), VOCAB).double())
    for b, parents in enumerate(rows):
        path = [0]
        while True:
            follows = [i for i, p in enumerate(parents) if i and p == path[-1] and tokens[b][i] == choices[b][path[-1]]]
            if not follows:
                break
            path += follows
        assert accepted.path[b, : int(accepted.n_kept[b])].tolist() == path
        assert int(accepted.next_tokens[b]) == choices[b][path[-1]]


def rejection(parents, tokens, p, q, widths, uniform):
    """One row by the book: siblings in order, each against the proposal without its predecessors.

    Args:
        p, q: distributions per node, as lists.
        uniform: node -> the uniform numbers of its children.

    Returns:
        The accepted nodes, and what the bonus is drawn from.
    """
    path, rest = [0], p[0]
    for width in widths:
        node, found = path[-1], None
        left, numbers = list(q[node]), uniform(node)
        children = [i for i, parent in enumerate(parents) if i and parent == node]
        for k, child in enumerate(children[:width]):
            if sum(left) == 0:
                break
            drawn = [x / sum(left) for x in left]
            if numbers[k] * drawn[tokens[child]] < rest[tokens[child]]:
                found = child
                break
            uncovered = [max(r - d, 0.0) for r, d in zip(rest, drawn)]
            rest = [u / sum(uncovered) for u in uncovered] if sum(uncovered) else rest
            left[tokens[child]] = 0.0
        if found is None:
            break
        path.append(found)
        rest = p[found]
    return path, rest


@given(st.sampled_from([(1,), (3,), (1, 1, 1), (2, 2), (3, 1)]), st.integers(0, 999), st.data())
@settings(max_examples=150, deadline=None)
def test_rejection_in_a_ragged_batch_is_the_walk_of_each_row(widths, seed, data):
    """Rows cut by a budget included, and proposals that leave tokens out."""
    parents, level = [-1], [0]
    for width in widths:
        first = len(parents)
        parents += [node for node in level for _ in range(width)]
        level = list(range(first, len(parents)))
    B, N = data.draw(st.integers(1, 3)), len(parents)
    budgets = [data.draw(st.integers(0, N - 1)) for _ in range(B)]
    rows = [[parent if i <= budget else -1 for i, parent in enumerate(parents)] for budget in budgets]
    tokens = [data.draw(distinct_siblings(parents, VOCAB)) for _ in rows]
    rng = torch.Generator().manual_seed(seed)
    logits, drafted = (2 * torch.randn(B, N, VOCAB, generator=rng, dtype=torch.float64) for _ in range(2))
    q = drafted.masked_fill(drafted < drafted.mean(), -torch.inf).index_fill(2, torch.tensor([0]), 0.0).softmax(-1)
    trees = from_parents(torch.tensor(tokens), torch.tensor(rows), len(widths))
    trees = replace(trees, proposals=Proposals(q, widths))
    sampler, keys = KeyedSampler(0.9, seed=seed), torch.arange(B)
    choices = Choices(logits, keys, 7 + trees.depths)
    accepted = RejectionVerifier(sampler).accept(trees, logits, choices)
    p = sampler.weights(logits).softmax(-1)
    for b in range(B):

        def at(node, b=b):
            return keys[b : b + 1], choices.positions[b : b + 1, node : node + 1]

        def uniform(node, at=at):
            return uniform_noise(seed, *at(node), max(widths), ACCEPT_STREAM)[0, 0].tolist()

        path, rest = rejection(rows[b], tokens[b], p[b].tolist(), q[b].tolist(), widths, uniform)
        noise = gumbel_noise(seed, *at(path[-1]), VOCAB, torch.float64, BONUS_STREAM)[0, 0]
        assert accepted.path[b, : int(accepted.n_kept[b])].tolist() == path
        assert int(accepted.next_tokens[b]) == int((torch.tensor(rest).log() + noise).argmax())


@st.composite
def pools(draw):
    """Rows of candidates in order of creation, scores non-increasing along paths and often tied, with budgets."""
    size = draw(st.integers(1, 13))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
        scores = [0.0]
        for parent in parents[1:]:
            scores.append(scores[parent] - draw(st.sampled_from([0.0, 0.0, 0.5, 1.0, float("inf")])))
        rows.append((parents, scores, draw(st.integers(0, size + 2))))
    return rows


@given(pools())
@settings(max_examples=150, deadline=None)
def test_each_row_keeps_its_own_best_candidates(rows):
    """Also where log q is -inf: the choice stays ancestor-closed."""
    size, budgets = len(rows[0][0]), tuple(row[2] for row in rows)
    tree = best_of_pool(
        torch.arange(size).expand(len(rows), size),
        torch.tensor([row[0] for row in rows]),
        torch.tensor([row[1] for row in rows]),
        budgets,
        size,
    )
    assert tree.tokens.shape[1] == min(1 + max(budgets), size)
    for b, (parents, scores, budget) in enumerate(rows):
        kept = sorted(range(size), key=lambda i: (-scores[i], i))[: budget + 1]
        place = {-1: -1} | {node: i for i, node in enumerate(kept)}
        padding = tree.tokens.shape[1] - len(kept)
        assert tree.tokens[b, : len(kept)].tolist() == kept
        assert tree.parents[b].tolist() == [*(place[parents[i]] for i in kept), *[-1] * padding]


@st.composite
def histories(draw):
    """Rounds of a batch: the width of each tree pass, and which nodes each row keeps, none of an idle row."""
    batch = draw(st.integers(1, 3))
    rounds = []
    for _ in range(draw(st.integers(1, 5))):
        width = draw(st.integers(1, 5))
        paths = []
        for _ in range(batch):
            nodes = draw(st.sets(st.integers(1, width - 1))) if width > 1 else set()
            paths.append(() if draw(st.integers(0, 5)) == 0 else (0, *sorted(nodes)))
        rounds.append((width, paths))
    return [draw(st.integers(0, 4)) for _ in range(batch)], rounds


@given(histories())
@settings(max_examples=120, deadline=None)
def test_commits_of_ragged_rows_are_those_of_python_lists(history):
    """Every value that was ever written differs from all others, so a misplaced one shows."""
    prompts, rounds = history
    B, layers = len(prompts), 2
    cache = RaggedKV(layers, B, 1, 32, 1, torch.float64, torch.device("cpu"))
    wanted: list[list[float]] = []
    fresh = iter(range(1, 10_000))
    for b, length in enumerate(prompts):
        values = [float(next(fresh)) for _ in range(length)]
        cache.begin_prefill(b)
        for layer in range(layers):
            x = torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1) + 0.25 * layer
            cache.write(layer, x, -x)
        cache.set_length(b, length)
        wanted.append(values)
    for width, paths in rounds:
        nodes = [[float(next(fresh)) for _ in range(width)] for _ in range(B)]
        cache.begin_tree(width)
        for layer in range(layers):
            x = torch.tensor(nodes, dtype=torch.float64)[:, None, :, None] + 0.25 * layer
            cache.write(layer, x, -x)
        P = max(1, *(len(path) for path in paths))
        padded = torch.tensor([[*path, *[0] * (P - len(path))] for path in paths])
        cache.commit(padded, paths)
        for b, path in enumerate(paths):
            wanted[b] += [nodes[b][i] for i in path]
        assert cache.lengths == [len(row) for row in wanted] == cache.lengths_device.tolist()
        for layer in range(layers):
            for b, row in enumerate(wanted):
                keys = cache.data[layer, 0, b, 0, : len(row), 0].tolist()
                assert keys == [value + 0.25 * layer for value in row]
                assert cache.data[layer, 1, b, 0, : len(row), 0].tolist() == [-key for key in keys]
