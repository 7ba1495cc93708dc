"""Static trees: the published shapes, what a tree is refused for, cuts and padding, and the fit against brute force."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.lineup import Head, make_methods
from mmspec import checkpoint
from mmspec.loop import generate
from mmspec.sampling import GreedySampler
from mmspec.static_tree import EAGLE_25, MEDUSA_63, TOKEN_RECYCLING_80, StaticTree, expected_tau, fit
from mmspec.tree import from_parents, without_padding
from mmspec.types import InputError, Tree
from tests import families, tiny


@pytest.mark.parametrize(
    ("tree", "levels"),
    [
        (TOKEN_RECYCLING_80, [8, 21, 25, 15, 8, 3]),
        (EAGLE_25, [4, 8, 8, 3, 2]),
        (MEDUSA_63, [10, 28, 23, 2]),
    ],
    ids=["token_recycling", "eagle", "medusa"],
)
def test_published_trees_have_their_levels(tree, levels):
    assert [level.stop - level.start for level in tree.levels] == [1, *levels]
    assert (tree.budget, tree.depth) == (sum(levels), len(levels))


def test_a_small_tree_by_hand():
    """root ─┬─ 1 ─┬─ 3 ── 5
    │     └─ 4
    └─ 2
    """
    tree = StaticTree(((0,), (0, 0), (1,), (0, 0, 0), (0, 1)))
    assert tree.parents.tolist() == [-1, 0, 0, 1, 1, 3]
    assert tree.ranks.tolist() == [0, 0, 1, 0, 1, 0]
    assert tree.depths.tolist() == [0, 1, 1, 2, 2, 3]
    assert tree.places.tolist() == [-1, 0, 2, 1, 4, 3]
    assert tree.levels == (slice(0, 1), slice(1, 3), slice(3, 5), slice(5, 6))
    assert tree.ancestors.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 1, 0, 1],
    ]
    drawn = StaticTree.parse("root:2 | 0:2 | 00:1")
    assert drawn.paths == ((0,), (1,), (0, 0), (0, 1), (0, 0, 0))
    assert torch.equal(drawn.ancestors, tree.ancestors)


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ((), "at least one node"),
        (((0, 0), (0,)), r"\[0, 0\] needs \[0\] before it"),
        (((0,), (2,)), r"\[2\] needs \[1\] before it"),
        (((0,), (0,)), r"\[0\] is there twice"),
        (((0,), (-1,)), r"\[-1\] is no path"),
        (((),), "is there twice"),
    ],
)
def test_what_is_no_tree_is_refused_in_one_line(paths, said):
    with pytest.raises(ValueError, match=said) as caught:
        StaticTree(paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("notation", ["root", "root:x", "roots:2", "root:2 0", "a:2"])
def test_what_is_no_notation_is_refused(notation):
    with pytest.raises(ValueError, match="is not PREFIX:CHILDREN"):
        StaticTree.parse(notation)


def test_a_file_gives_its_tree_back(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"paths": TOKEN_RECYCLING_80.paths, "expected_tau": 2.5}))
    assert StaticTree.load(file) == TOKEN_RECYCLING_80


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{", "holds no static tree"),
        ("[]", "holds no static tree"),
        ('{"nodes": []}', "'paths'"),
        ('{"paths": 3}', "holds no static tree"),
        ('{"paths": [[1]]}', r"\[1\] needs \[0\]"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "tree.json").write_text(content)
    with pytest.raises(InputError, match=said) as caught:
        StaticTree.load(tmp_path / "tree.json")
    assert "\n" not in str(caught.value)


@given(st.integers(1, 80), st.integers(1, 7))
@settings(deadline=None)
def test_a_cut_is_a_tree_of_the_best_nodes(budget, depth):
    tree = TOKEN_RECYCLING_80.cut(budget, depth)
    assert tree.budget == min(budget, sum(len(path) <= depth for path in TOKEN_RECYCLING_80.paths))
    assert tree.paths == tuple(p for p in TOKEN_RECYCLING_80.paths if len(p) <= depth)[:budget]
    assert tree.cut(budget, depth) is tree


def paths_of(tree: Tree, row: int) -> set[tuple[int, ...]]:
    """The tokens from the root to each node that is no padding, by walking up."""
    found = set()
    for node in range(tree.tokens.shape[1]):
        if node == 0 or int(tree.parents[row, node]) >= 0:
            path, at = [], node
            while at >= 0:
                path.append(int(tree.tokens[row, at]))
                at = int(tree.parents[row, at])
            found.add(tuple(reversed(path)))
    return found


def test_rows_are_cut_and_padded_each_on_its_own():
    shape = StaticTree(((0,), (0, 0), (1,), (0, 0, 0), (0, 1)))
    tokens = torch.tensor([[9, 1, 2, 3, 4, 5]] * 3)
    tokens[2, [1, 3, 4, 5]] = -1
    trees = shape.trees(tokens, (2, 5, 5))
    assert paths_of(trees, 0) == {(9,), (9, 1), (9, 1, 3)}
    assert paths_of(trees, 1) == {(9,), (9, 1), (9, 2), (9, 1, 3), (9, 1, 4), (9, 1, 3, 5)}
    assert paths_of(trees, 2) == {(9,), (9, 2)}
    assert int(trees.tokens.min()) >= 0
    exact = from_parents(trees.tokens[1:2], trees.parents[1:2], 3)
    assert torch.equal(trees.ancestors[1:2], exact.ancestors)
    assert torch.equal(trees.depths[1:2], exact.depths)
    assert trees.depths[0].tolist() == [0, 1, 0, 2, 0, 0]


def test_padding_of_all_rows_can_be_taken_out():
    shape = StaticTree(((0,), (0, 0), (1,), (0, 0, 0), (0, 1)))
    tokens = torch.tensor([[9, -1, 2, -1, -1, -1], [8, 1, -1, -1, 4, -1]])
    whole = shape.trees(tokens, (5, 5))
    small = without_padding(whole)
    assert small.tokens.shape == (2, 4)
    for row in range(2):
        assert paths_of(small, row) == paths_of(whole, row)
    assert small.ancestors[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    full = shape.trees(tokens.abs(), (5, 5))
    assert without_padding(full) is full
    assert without_padding(shape.trees(tokens, (0, 0))).tokens.tolist() == [[9], [8]]


def all_trees(depth: int, width: int, size: int) -> set[frozenset[tuple[int, ...]]]:
    """Every tree of `size` nodes, each behind its parent and its better siblings."""
    nodes = [p for n in range(1, depth + 1) for p in itertools.product(range(width), repeat=n)]
    trees: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(size):
        trees = {
            tree | {node}
            for tree in trees
            for node in nodes
            if node not in tree
            and (len(node) == 1 or node[:-1] in tree)
            and (node[-1] == 0 or (*node[:-1], node[-1] - 1) in tree)
        }
    return trees


FALLING = st.lists(st.integers(1, 40), min_size=3, max_size=3).map(
    lambda level: [n / (sum(level) + 7) for n in sorted(level, reverse=True)]
)


@given(st.lists(FALLING, min_size=3, max_size=3), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_no_tree_of_the_size_expects_more_than_the_fitted_one(rates, size):
    best = max(
        expected_tau(StaticTree(tuple(sorted(tree, key=lambda path: (len(path), path)))), rates)
        for tree in all_trees(3, 3, size)
    )
    fitted = fit(rates, size)
    assert fitted.budget == size
    assert expected_tau(fitted, rates) == pytest.approx(best)


def test_each_beginning_of_a_fitted_tree_is_the_tree_of_that_size():
    rates = [[0.5, 0.2, 0.1], [0.6, 0.1, 0.0], [0.3, 0.2, 0.1]]
    whole = fit(rates, 12)
    for size in range(1, 13):
        assert fit(rates, size).paths == whole.paths[:size]
    assert expected_tau(whole, rates) > expected_tau(EAGLE_25.cut(12, 5), rates)


def test_nodes_that_were_never_right_are_left_out():
    tree = fit([[0.5, 0.0], [0.0, 0.4]], 10)  # below rank 0 at depth 1, rank 1 hides behind rank 0
    assert tree.paths == ((0,),)
    with pytest.raises(ValueError, match="no candidate was ever right"):
        fit([[0.0, 0.0]], 4)


# ---- published trees and checkpoints ----


def test_published_trees_decode_any_checkpoint_without_being_fitted(tmp_path):
    """The paper's static tree and the dynamic one on one EAGLE checkpoint, both with plain decoding's text."""
    target = tiny.llava(dtype="float32")
    folder = tiny.run_folder(tmp_path / "run", target, checkpoint.DraftTree(4, 3, 9))
    loaded = checkpoint.load(folder)
    methods, said = make_methods(target, [Head("eagle", loaded, ("fixed", "eagle25", "medusa63"))], 2)
    assert [method.name for method in methods] == ["plain", "eagle", "eagle_25", "eagle_medusa63"]
    assert said["eagle_25"] == {
        "drafter": "eagle", "checkpoint": "run", "policy": "fixed", "tree": "eagle25", "depth": 5, "budget": 25,
    }  # fmt: skip
    wanted = families.requests(target, 4, 12)
    texts, widest = [], []
    for method in methods:
        outputs = generate(target, wanted, method.drafter, method.policy, GreedySampler(), max_batch=2)
        texts.append([output.tokens for output in outputs])
        widest.append(max(nodes for output in outputs for _, nodes, _, _ in output.rounds))
    assert texts[1:] == texts[:1] * 3
    assert widest == [0, 9, 25, 63]
