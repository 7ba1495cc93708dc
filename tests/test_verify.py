"""Verification against a walk in plain Python, and sampled acceptance in distribution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.sampling import GreedySampler, KeyedSampler, gumbel_noise, make_sampler
from mmspec.tree import from_parents
from mmspec.verify import MatchVerifier


@st.composite
def trees(draw):
    """Trees with distinct siblings, and the choice of the target at every node."""
    size = draw(st.integers(1, 10))
    parents = [-1] + [draw(st.integers(0, i - 1)) for i in range(1, size)]
    used: dict[int, set[int]] = {}
    tokens = [7]
    for parent in parents[1:]:
        free = [t for t in range(12) if t not in used.setdefault(parent, set())]
        tokens.append(draw(st.sampled_from(free)))
        used[parent].add(tokens[-1])
    return tokens, parents, [draw(st.integers(0, 11)) for _ in range(size)]


@given(trees())
@settings(max_examples=200, deadline=None)
def test_accepted_path_is_the_walk_that_follows_the_targets_choices(case):
    tokens, parents, choices = case
    path, node = [0], 0
    while True:
        nexts = [i for i, p in enumerate(parents) if p == node and tokens[i] == choices[node]]
        if not nexts:
            break
        node = nexts[0]
        path.append(node)
    tree = from_parents(torch.tensor([tokens]), torch.tensor([parents]), len(tokens))
    scores = torch.nn.functional.one_hot(torch.tensor([choices]), 12).double()
    accepted = MatchVerifier().accept(tree, scores)
    kept = int(accepted.n_kept)
    assert accepted.path[0, :kept].tolist() == path
    assert int(accepted.next_tokens) == choices[path[-1]]


def test_noise_depends_on_seed_key_and_position_alone():
    keys, positions = torch.tensor([3, 4]), torch.tensor([[5, 6, 7], [5, 6, 7]])
    noise = gumbel_noise(1, keys, positions, 11, torch.float64)
    alone = gumbel_noise(1, keys[1:], positions[1:, 2:], 11, torch.float64)
    assert torch.equal(noise[1:, 2:], alone)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, gumbel_noise(2, keys, positions, 11, torch.float64))


def test_noise_is_gumbel():
    """Mean 0.5772 and standard deviation pi / sqrt(6); 200,000 draws put both within 0.02 (6 sigma)."""
    noise = gumbel_noise(0, torch.arange(20), torch.arange(100).expand(20, 100), 100, torch.float64)
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.02


@pytest.mark.parametrize("sampler", [KeyedSampler(0.7), KeyedSampler(1.3, top_k=4), KeyedSampler(1.0, top_p=0.8)])
def test_first_two_tokens_follow_the_target_distribution(sampler):
    """Chi-square over the pair (first, second) emitted through a tree, against the processed distribution.

    A tree that offers some first tokens and not others must not tilt the pair; 0.1% critical values, 20,000 draws.
    """
    V, draws = 6, 20_000
    torch.manual_seed(0)
    logits = torch.randn(V + 1, V, dtype=torch.float64)  # row V: after the root; row t: after the first token t
    tree = from_parents(torch.tensor([[0, 1, 4]]), torch.tensor([[-1, 0, 0]]), 1)
    node_logits = torch.stack([logits[V], logits[1], logits[4]]).expand(draws, 3, V)
    keys = torch.arange(draws)
    positions = torch.tensor([[10, 11, 11]]).expand(draws, 3)
    batch = type(tree)(
        tree.tokens.expand(draws, 3),
        tree.parents.expand(draws, 3),
        tree.depths.expand(draws, 3),
        tree.ancestors.expand(draws, 3, 3),
        1,
    )
    accepted = MatchVerifier().accept(batch, sampler.scores(node_logits, keys, positions))
    bonus = accepted.next_tokens
    last = accepted.path.gather(1, accepted.n_kept[:, None] - 1)[:, 0]
    first = torch.where(accepted.n_kept == 2, batch.tokens.gather(1, last[:, None])[:, 0], bonus)
    # Rows whose first token was not offered draw their second one in the next round, at the next position.
    second_logits = logits[first].unsqueeze(1)
    drawn = sampler.scores(second_logits, keys, torch.full((draws, 1), 11)).argmax(-1)[:, 0]
    second = torch.where(accepted.n_kept == 2, bonus, drawn)
    assert torch.equal(second, drawn)  # the same noise at the same position: identical, not merely alike

    def processed(row):
        scores = sampler.scores(row[None, None], torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))
        kept = torch.isfinite(scores[0, 0])
        return torch.where(kept, row / sampler.temperature, torch.tensor(-math.inf)).softmax(-1)

    expected = torch.stack([processed(logits[V])[a] * processed(logits[a]) for a in range(V)]).flatten() * draws
    observed = torch.bincount(first * V + second, minlength=V * V).double()
    assert observed[expected == 0].sum() == 0
    cells = expected > 5
    chi2 = ((observed[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = int(cells.sum()) - 1
    # Wilson-Hilferty: the 99.9% quantile of chi-square.
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < critical


def test_bad_sampling_settings_are_refused():
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": math.inf}):
        with pytest.raises(ValueError, match="must be"):
            KeyedSampler(**bad)
    assert isinstance(make_sampler(0), GreedySampler)
