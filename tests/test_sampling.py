"""Keyed noise and the settings of samplers; `test_rejection.py` has sampled text in distribution."""

import math

import pytest
import torch

from mmspec.sampling import GreedySampler, KeyedSampler, gumbel_noise, make_sampler


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


def test_bad_sampling_settings_are_refused():
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": math.inf}):
        with pytest.raises(ValueError, match="must be"):
            KeyedSampler(**bad)
    assert isinstance(make_sampler(0), GreedySampler)
