"""What property tests draw: trees of a batch, and the walk in plain Python that they are compared with."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def forests(draw, max_nodes=9):
    """Parents of 1 to 3 rows of one width: any tree, -1 beyond node 0 for padding, which has no children."""
    width = draw(st.integers(1, max_nodes))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parents = [-1]
        for i in range(1, width):
            parents.append(draw(st.sampled_from([-1, 0, *(j for j in range(1, i) if parents[j] >= 0)])))
        rows.append(parents)
    return rows


@st.composite
def distinct_siblings(draw, parents, vocab):
    """A token for each node of one row, below `vocab`; more siblings than that get tokens beyond it."""
    tokens, used = [], {}
    for parent in parents:
        taken = used.setdefault(parent, set()) if parent >= 0 else set()
        free = [t for t in range(vocab) if t not in taken]
        tokens.append(draw(st.sampled_from(free or [vocab + len(tokens)])))
        taken.add(tokens[-1])
    return tokens


def line(parents, node):
    """A node and its ancestors, from the node up."""
    nodes = []
    while node >= 0:
        nodes.append(node)
        node = parents[node]
    return nodes
