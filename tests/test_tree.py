"""Trees: hand-written cases a person can check; `test_properties.py` has the others."""

import pytest
import torch

from mmspec.tree import ancestors_of, best_of_pool, chain, from_parents, pruned, root_only
from mmspec.types import Tree

# root ─┬─ 1 ── 3
#       └─ 2
PARENTS = torch.tensor([[-1, 0, 0, 1]])


def test_ancestor_matrix_of_a_small_tree():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    assert ancestors_of(PARENTS, 2)[0].int().tolist() == expected


def test_padding_is_no_ancestor_and_has_no_children():
    tree = from_parents(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[-1, 0, -1]]), 1)
    assert tree.ancestors[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 0]]


def test_root_only_and_chain():
    assert root_only(torch.tensor([5, 6])).tokens.tolist() == [[5], [6]]
    tree = chain(torch.tensor([[5, 6, 7]]))
    assert tree.parents.tolist() == [[-1, 0, 1]]
    assert tree.depths.tolist() == [[0, 1, 2]]
    assert tree.ancestors[0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_trees_that_are_too_deep_to_be_counted_in_fp32_are_refused():
    line = torch.arange(-1, 128).unsqueeze(0)
    assert torch.equal(ancestors_of(line, 128)[0], torch.ones(129, 129, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="depth 129"):
        ancestors_of(line, 129)


def test_shapes_are_checked():
    one = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="Tree shapes disagree"):
        Tree(one, one, one, torch.ones(1, 3, 3, dtype=torch.bool), 1)


def test_budget_cuts_each_row_on_its_own():
    tokens = torch.tensor([[9, 1, 2, 3, 4], [9, 1, 2, 3, 4]])
    parents = torch.tensor([[-1, 0, 0, 1, 1], [-1, 0, 0, 1, 1]])
    scores = torch.tensor([[0.0, -0.1, -3.0, -0.2, -0.3], [0.0, -0.1, -0.5, -2.0, -2.1]])
    tree = best_of_pool(tokens, parents, scores, (3, 1), 2)
    assert tree.tokens[0].tolist() == [9, 1, 3, 4]
    assert tree.parents[0].tolist() == [-1, 0, 1, 1]
    assert tree.parents[1].tolist() == [-1, 0, -1, -1]  # one node, the rest is padding


def test_a_certain_child_ties_with_its_parent_and_the_tree_stays_closed():
    """log q = 0 makes parent and child score alike: the parent has to win the tie."""
    tokens, parents = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1, 0, 1, 2]])
    tree = best_of_pool(tokens, parents, torch.zeros(1, 4), (2,), 3)
    assert tree.tokens.tolist() == [[0, 1, 2]]
    assert tree.parents.tolist() == [[-1, 0, 1]]


def test_what_is_no_number_comes_last():
    tokens, parents = torch.tensor([[9, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]])
    tree = best_of_pool(tokens, parents, torch.tensor([[0.0, torch.nan, -1.0, torch.nan]]), (2,), 2)
    assert tree.tokens.tolist() == [[9, 2, 1]]
    assert tree.parents.tolist() == [[-1, 0, 0]]


def test_what_hangs_from_a_pruned_node_goes_with_it_and_scores_stay_with_their_nodes():
    tokens, parents = torch.tensor([[9, 1, 2, 3, 4]]), torch.tensor([[-1, 0, 0, 1, 3]])
    scores = torch.tensor([[0.0, -0.1, -3.0, -0.2, -0.3]])
    tree = best_of_pool(tokens, parents, scores, (4,), 3, with_scores=True)
    assert tree.tokens.tolist() == [[9, 1, 3, 4, 2]]
    left = pruned(tree, torch.tensor([[False, True, False, True, True]]))
    assert left.tokens.tolist() == [[9, 1, 2]]
    assert left.parents.tolist() == [[-1, 0, 0]]
    assert left.depths.tolist() == [[0, 1, 1]]
    assert torch.equal(left.scores, torch.tensor([[0.0, -0.1, -3.0]]))
    assert pruned(tree, torch.zeros(1, 5, dtype=torch.bool)).tokens.tolist() == [[9]]
