"""Packed linear layers of a target: the same products, plain ones wherever they are trained with, copied or moved."""

import copy

import pytest
import torch
from torch import nn

from mmspec.targets import _packed
from mmspec.targets._packed import PackedLinear, pack

pytestmark = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="a torch without oneDNN")


@pytest.fixture(autouse=True)
def pays(monkeypatch):
    """Packing as on a machine where it pays; the products are there on all."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 80), nn.SiLU(), nn.Linear(80, 48, bias=False))
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33])
def test_packed_layers_give_the_products_of_plain_ones(rows):
    ours, theirs = layers(), layers()
    pack(ours)
    x = torch.randn(2, rows, 48)
    with torch.inference_mode():
        got = ours(x)
        assert isinstance(ours[0], PackedLinear)
        assert ours[0].packed is not None
        torch.testing.assert_close(got, theirs(x), rtol=1e-5, atol=1e-5)
        one = ours(x[:, :1])
    torch.testing.assert_close(one, got[:, :1], rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_packed_layers():
    ours, theirs = layers(), layers()
    pack(ours)
    with torch.inference_mode():
        ours(torch.zeros(1, 1, 48))
    grads = []
    for one in (ours, theirs):
        x = torch.ones(3, 48, requires_grad=True)
        one(x).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_copy_packs_what_it_holds_then_and_has_the_same_state():
    ours = layers()
    pack(ours)
    with torch.inference_mode():
        ours(torch.zeros(1, 1, 48))
    twin = copy.deepcopy(ours)
    assert list(twin.state_dict()) == list(layers().state_dict())
    with torch.no_grad():
        twin[0].weight.mul_(2)
        expected = nn.functional.linear(torch.ones(4, 48), twin[0].weight, twin[0].bias)
    with torch.inference_mode():
        torch.testing.assert_close(twin[0](torch.ones(4, 48)), expected)


def test_a_weight_that_changes_is_packed_again():
    ours = layers()
    pack(ours)
    x = torch.ones(1, 48)
    with torch.inference_mode():
        ours(x)
    with torch.no_grad():
        ours[0].weight.mul_(2)
        expected = nn.functional.linear(x, ours[0].weight, ours[0].bias)
    with torch.inference_mode():
        torch.testing.assert_close(ours[0](x), expected)


def test_a_weight_made_in_inference_mode_stays_plain():
    with torch.inference_mode():
        ours = layers()
        pack(ours)
        torch.testing.assert_close(ours(torch.ones(1, 48)), layers()(torch.ones(1, 48)))
        assert ours[0].packed is None


def test_a_moved_layer_is_plain():
    ours = layers()
    pack(ours)
    with torch.inference_mode():
        ours(torch.zeros(1, 1, 48))
    ours.double()
    x = torch.ones(1, 48, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(ours(x), layers().double()(x))


def test_other_dtypes_and_more_than_the_limit_stay_plain(monkeypatch):
    for one, most in ((layers(torch.float64), _packed.MOST), (layers(), 48 * 80 * 4)):
        monkeypatch.setattr(_packed, "MOST", most)
        pack(one)
        assert type(one[0]) is nn.Linear


def test_where_packing_does_not_pay_layers_stay_plain(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    one = layers()
    pack(one)
    assert type(one[0]) is nn.Linear
