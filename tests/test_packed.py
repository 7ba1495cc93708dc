"""The attention of a lean training step: its kernels, its parts, and what it remembers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from mmspec.heads import _packed
from mmspec.heads._packed import Run, UnrolledAttention, chunked, chunked_backward, fused, fused_backward, pack
from mmspec.losses import valid_pairs
from mmspec.targets._rows import lay_out
from mmspec.types import Features


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def features(segment, answer):
    segment = torch.tensor(segment)
    none = drawn(*segment.shape, 0)
    return Features(segment, segment > 0, torch.tensor(answer), segment > 9, none, none, segment=segment)


def test_draft_positions_are_those_from_which_a_draft_lies_within_one_reply():
    """Two rows: two conversations in the first (its padding at the end), one with two replies in the second."""
    segment = [[1, 1, 1, 1, 1, 2, 2, 2, 2, 0], [1] * 10]
    answer = [[0, 0, 1, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 2, 2, 0, 0]]
    packed = pack(features(segment, answer))
    assert packed.tokens.tolist() == [0, 1, 2, 5, 6, 10, 11, 12, 13, 14, 15]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5]
    assert packed.runs == (Run(0, 1, 2), Run(3, 3, 2), Run(5, 5, 2), Run(5, 10, 1))
    assert packed.tokens[packed.drafts].tolist() == [1, 2, 5, 6, 10, 11, 15]
    assert packed.left.tolist() == [2, 1, 2, 1, 2, 1, 1]


def test_the_marks_alone_tell_how_many_draft_positions_there_are():
    """Replies of any length and distance, at the very start or the cut-off end of a conversation."""
    draw = random.Random(0)
    for _ in range(300):
        answer = [
            mark for n in range(1, 5) for mark in [0] * draw.choice([0, 0, 1, 4]) + [n] * draw.choice([0, 1, 2, 5])
        ]
        answer = [*answer, 0, 0, 0][: draw.randint(3, 20)]
        assert valid_pairs(torch.tensor(answer)) == len(pack(features([[1] * len(answer)], [answer])).drafts), answer


def test_a_conversation_without_a_draft_position_costs_nothing():
    packed = pack(features([[1, 1, 1, 2, 2, 2]], [[0, 0, 1, 0, 0, 0]]))
    assert len(packed.tokens) == len(packed.drafts) == len(packed.runs) == 0


@pytest.mark.parametrize("causal", [True, False])
def test_the_fused_and_the_chunked_kernel_agree(causal, monkeypatch):
    """Also in a softmax over more keys than are given: its output and log-sum-exp come from outside."""
    monkeypatch.setattr(_packed, "CHUNK", 7)
    q, grad = drawn(1, 3, 20, 8), drawn(1, 3, 20, 8)
    k, v = drawn(1, 3, 20 if causal else 31, 8), drawn(1, 3, 20 if causal else 31, 8)
    ours, theirs = chunked(q, k, v, causal), fused(q, k, v, causal)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-12)
    out, lse = theirs[0] + 0.1 * drawn(1, 3, 20, 8), theirs[1] + 0.7
    for a, b in zip(chunked_backward(grad, q, k, v, out, lse, causal), fused_backward(grad, q, k, v, out, lse, causal)):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("kernel", ["fused", "chunked"])
@pytest.mark.parametrize("heads", [pytest.param((4, 4), marks=pytest.mark.slow), (4, 2)])
def test_gradients_are_those_of_finite_differences(kernel, heads, monkeypatch):
    monkeypatch.setattr(_packed, "CHUNK", 2)
    if kernel == "chunked":
        monkeypatch.setattr(_packed, "_kernels", lambda q: (chunked, chunked_backward))
    runs = (Run(0, 0, 2), Run(0, 3, 2), Run(5, 6, 1))
    many, few = heads
    past = [drawn(1, few, 7, 4).requires_grad_() for _ in range(2)]
    steps = [[drawn(1, h, 5, 4).requires_grad_() for h in (many, few, few)] for _ in range(3)]

    def outputs(*tensors):
        keys, values, first, *rest = tensors
        attention = UnrolledAttention(keys, values, runs)
        outs = [attention(first)]
        outs += [attention(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
        return torch.stack(outs)

    assert torch.autograd.gradcheck(outputs, (*past, steps[0][0], *steps[1], *steps[2]))


def test_what_is_remembered_grows_with_the_length_and_not_with_its_square():
    def kept(T):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.numel()) or x, lambda x: x):
            attention = UnrolledAttention(drawn(1, 2, T, 4).requires_grad_(), drawn(1, 2, T, 4), (Run(0, 0, T),))
            attention(drawn(1, 2, T, 4))
            attention(*(drawn(1, 2, T, 4) for _ in range(3)))
        return sum(held)

    assert kept(200) == 2 * kept(100) > 0


def test_rows_are_filled_and_nobody_is_cut():
    lengths = [10, 70, 30, 60, 40, 120]
    places = lay_out(lengths, 100)
    assert [place.stop - place.start for place in places] == lengths
    rows = {}
    for place in places:
        rows.setdefault(place.row, []).append((place.start, place.stop))
    assert sorted(rows) == list(range(len(rows)))
    assert len(rows) == 4  # 120 alone; 70 + 30, 60 + 40, 10
    for spans in rows.values():
        spans.sort()
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert [place.row for place in lay_out(lengths, 0)] == list(range(6))
