"""Batched tensor code against slow references in plain Python: trees, acceptance and commits of ragged batches."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.cache import RaggedKV
from mmspec.tree import ancestors_of, best_of_pool, from_parents
from mmspec.verify import MatchVerifier

VOCAB = 5


@st.composite
def forests(draw):
    """Parents of 1 to 3 rows of one width: any tree, -1 beyond node 0 for padding, which has no children."""
    width = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [-1]
        for i in range(1, width):
            parents.append(draw(st.sampled_from([-1, 0, *(j for j in range(1, i) if parents[j] >= 0)])))
        rows.append(parents)
    return rows


def line(parents, node):
    """A node and its ancestors, from the node up."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = parents[node]
    return nodes


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
@settings(max_examples=150, deadline=None)
def test_acceptance_in_a_ragged_batch_is_the_walk_of_each_row(rows, data):
    """Rows know nothing of each other, and padding is never accepted, whatever token it carries."""
    tokens, choices = [], []
    for parents in rows:
        used: dict[int, set[int]] = {}
        row = []
        for parent in parents:
            free = [t for t in range(VOCAB) if parent < 0 or t not in used.setdefault(parent, set())]
            row.append(data.draw(st.sampled_from(free or [VOCAB + len(row)])))
            used.setdefault(parent, set()).add(row[-1])
        tokens.append(row)
        choices.append(data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(row), max_size=len(row))))
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
        kept = sorted(sorted(range(size), key=lambda i: (-scores[i], i))[: budget + 1])
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
