"""Penalties per node: each node's scores are those of transformers' processors on its own path."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from mmspec.sampling import GreedySampler, KeyedSampler, Penalties, make_sampler
from mmspec.tree import from_parents, root_only
from mmspec.types import Paths
from tests.strategies import forests, line

V = 5
"""Few tokens, so that n-grams do repeat."""


@st.composite
def batches(draw):
    """Rows of histories of different lengths, each with the tokens and parents of a tree of the same width."""
    tokens = st.integers(0, V - 1)
    return [
        (draw(st.lists(tokens, max_size=9)), [draw(tokens) for _ in parents], parents) for parents in draw(forests(6))
    ]


def paths_of(rows):
    longest = max(len(history) for history, _, _ in rows)
    # What lies beyond a row's committed tokens may be anything: here a token that would be penalised.
    history = torch.tensor([[*history, *[1] * (longest - len(history))] for history, _, _ in rows], dtype=torch.long)
    lengths = torch.tensor([len(history) for history, _, _ in rows])
    tokens, parents = (torch.tensor([row[k] for row in rows]) for k in (1, 2))
    return Paths(history.reshape(len(rows), longest), lengths, from_parents(tokens, parents, max(tokens.shape[1], 1)))


@given(batches(), st.sampled_from([1.0, 1.3, 0.7]), st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_scores_of_every_node_are_those_of_transformers_processors_on_its_path(rows, repetition, ngram):
    logits = torch.randn(len(rows), len(rows[0][1]), V, dtype=torch.float64)
    got = GreedySampler(Penalties(repetition, ngram)).scores(logits, None, None, paths_of(rows))
    for b, (history, tokens, parents) in enumerate(rows):
        for node, parent in enumerate(parents):
            if node and parent < 0:
                continue
            ids = torch.tensor([[*history, *(tokens[i] for i in reversed(line(parents, node)))]])
            expected = logits[b, node][None]
            expected = RepetitionPenaltyLogitsProcessor(repetition)(ids, expected)
            if ngram:
                expected = NoRepeatNGramLogitsProcessor(ngram)(ids, expected)
            assert torch.equal(got[b, node], expected[0]), (b, node)


def test_no_trigram_of_a_row_passes_through_the_border_of_history_and_tree():
    """History 1 2 3 1, root 2: the path ends in 1 2, so 3 may not follow; after the draft token 4 it may."""
    rows = [([1, 2, 3, 1], [2, 4], [-1, 0])]
    scores = GreedySampler(Penalties(no_repeat_ngram=3)).scores(torch.zeros(1, 2, V), None, None, paths_of(rows))
    assert scores[0, 0].isinf().tolist() == [False, False, False, True, False]
    assert not scores[0, 1].isinf().any()


def test_penalties_come_before_temperature_and_truncation():
    """Token 0 leads until the penalty; with top-k 1 only the new leader may be sampled."""
    paths = Paths(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, dtype=torch.long), root_only(torch.tensor([0])))
    logits = torch.tensor([[[3.0, 2.0, 1.0]]])
    sampler = KeyedSampler(0.5, top_k=1, penalties=Penalties(repetition=2.0))
    assert sampler.weights(logits, paths).tolist() == [[[-math.inf, 4.0, -math.inf]]]
    assert KeyedSampler(0.5, top_k=1).weights(logits).tolist() == [[[6.0, -math.inf, -math.inf]]]


def test_image_placeholders_beyond_the_logits_are_not_penalised():
    rows = [([V + 7, 2], [3], [-1])]
    scores = GreedySampler(Penalties(repetition=2.0)).scores(torch.ones(1, 1, V), None, None, paths_of(rows))
    assert scores[0, 0].tolist() == [1.0, 1.0, 0.5, 0.5, 1.0]


def test_settings():
    for bad in ({"repetition": 0.0}, {"repetition": math.inf}, {"no_repeat_ngram": -1}):
        with pytest.raises(ValueError, match="must be"):
            Penalties(**bad)
    assert not make_sampler(0.0).needs_history
    assert make_sampler(0.8, repetition_penalty=1.05).needs_history
    assert make_sampler(0.0, no_repeat_ngram=3).needs_history
    with pytest.raises(ValueError, match="need the paths"):
        make_sampler(0.0, no_repeat_ngram=3).scores(torch.zeros(1, 1, V), None, None)


def test_without_penalties_the_logits_are_passed_on_untouched():
    logits = torch.zeros(1, 1, V)
    assert GreedySampler().scores(logits, None, None) is logits
