"""The chunked vocabulary loss, whose gradients are written out, against the plain formulas under autograd."""

from __future__ import annotations

import math

import pytest
import torch

from mmspec import losses
from mmspec.losses import TERMS, Aims, LossConfig, soft_cross_entropy, total_variation, vocabulary_losses

V, D, P = 50, 6, 9


def case(dtype, spread=1.0):
    """Predictions of which up to three aim at one position, one at none but the last, and weights of two steps."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    of = torch.tensor([0, 0, 0, 1, 2, 2, 4, 5, 5, 5, 6, 8])
    aims = Aims(drawn(P, D), of, torch.linspace(0.3, 1.0, len(of), dtype=torch.float64))
    predicted, weight = drawn(len(of), D).mul_(spread), drawn(V, D).mul_(spread)
    frozen = drawn(V, D)
    return predicted.requires_grad_(), aims, weight.requires_grad_(), lambda states: states @ frozen.T


def found(predicted, aims, unembed, config, weight=None, draft_ids=None):
    """Value and gradients of the chunked loss."""
    leaves = [predicted] if weight is None else [predicted, weight]
    total, hits, covers = vocabulary_losses(predicted, aims, unembed, config, weight, draft_ids)
    return total.detach(), torch.autograd.grad(total * 2.0, leaves), hits, covers


def written_out(predicted, aims, unembed, config, weight=None, draft_ids=None):
    """The same in one piece."""
    leaves = [predicted] if weight is None else [predicted, weight]
    truth = unembed(aims.truth)[aims.of]
    best = truth.argmax(-1)
    ids = torch.arange(V) if draft_ids is None else draft_ids
    logits = unembed(predicted) if weight is None else predicted @ weight.T
    p, covers = truth[:, ids].softmax(-1), torch.isin(best, ids)
    each = config.soft_ce * soft_cross_entropy(logits, p) + config.total_variation * total_variation(logits, p)
    for term in (losses.ranking, losses.top_k, losses.acceptance):
        weight = getattr(config, term.__name__)
        each = each + weight * term(logits, p) if weight else each
    total = (each * aims.weight.to(each.dtype) * covers).sum()
    hits = covers & (ids[logits.argmax(-1)] == best)
    return total.detach(), torch.autograd.grad(total * 2.0, leaves), hits, covers


WEIGHTS = [
    {"soft_ce": 1.0},
    {"soft_ce": 0.3},
    {"soft_ce": 1.0, "total_variation": 0.5},
    {"soft_ce": 0.0, "total_variation": 1.0},
    {"soft_ce": 0.0, "ranking": 0.7},
    {"soft_ce": 0.0, "top_k": 1.3},
    {"soft_ce": 0.0, "acceptance": 0.6},
    {"soft_ce": 0.2, "total_variation": 0.3, "ranking": 0.4, "top_k": 0.5, "acceptance": 0.6},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda w: "+".join(name for name in w if w[name]))
@pytest.mark.parametrize("own", ["none", "whole", "restricted"])
@pytest.mark.parametrize("cached", [1, 3 * V, 10**6])
def test_value_and_gradients_are_those_of_the_plain_formulas(weights, own, cached, monkeypatch):
    """In fp64, for every way of cutting: chunks of two positions, and rows of them one, three or all at a time."""
    monkeypatch.setattr(losses, "CACHED", cached)
    predicted, aims, weight, unembed = case(torch.float64)
    config = LossConfig(**weights, chunk=6, steps=3)
    draft_ids = torch.arange(0, V, 2) if own == "restricted" else None
    own_weight = {"none": None, "whole": weight, "restricted": weight[:25].detach().requires_grad_()}[own]
    ours = found(predicted, aims, unembed, config, own_weight, draft_ids)
    theirs = written_out(predicted, aims, unembed, config, own_weight, draft_ids)
    assert torch.allclose(ours[0], theirs[0], rtol=1e-12)
    for a, b in zip(ours[1], theirs[1]):
        assert torch.allclose(a, b, atol=1e-11, rtol=1e-11)
    assert torch.equal(ours[2], theirs[2])
    assert torch.equal(ours[3], theirs[3])
    if own == "restricted":
        assert 0 < ours[3].sum() < len(ours[3])  # or no row was masked
        assert not ours[1][0][~ours[3]].any()


def test_single_precision_is_as_close_as_the_plain_formulas_are():
    """Roundings of 2^-24 in sums of 50 products: 1e-5 of the largest entry leaves a factor of ten."""
    config = LossConfig(chunk=6, steps=3)
    predicted, aims, weight, unembed = case(torch.float64)
    exact = written_out(predicted, aims, unembed, config, weight)
    predicted, aims, weight, unembed = case(torch.float32)
    ours = found(predicted, aims, unembed, config, weight)
    assert float(ours[0]) == pytest.approx(float(exact[0]), rel=1e-5)
    for a, b in zip(ours[1], exact[1]):
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


def test_logits_of_a_million_neither_overflow_nor_lose_their_gradient():
    predicted, aims, weight, unembed = case(torch.float32, spread=1000.0)
    config = LossConfig(chunk=6, steps=3, total_variation=0.5)
    ours, theirs = (f(predicted, aims, unembed, config, weight) for f in (found, written_out))
    assert float((predicted @ weight.T).detach().abs().max()) > 1e6
    assert torch.allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(ours[1], theirs[1]):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))


def test_bf16_heads_sum_in_single_precision():
    """Against fp64 of the same bf16 numbers: logits and gradients round to 8 bits once each, the sums do not."""
    predicted, aims, weight, unembed = case(torch.bfloat16)
    config = LossConfig(chunk=6, steps=3)
    ours = found(predicted, aims, unembed, config, weight)
    wide = [x.detach().double().requires_grad_() for x in (predicted, weight)]
    truth = unembed(aims.truth)
    exact = written_out(
        wide[0], Aims(aims.truth.double(), aims.of, aims.weight), lambda s: truth.double(), config, wide[1]
    )
    assert ours[0].dtype == torch.float32
    assert float(ours[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    for a, b in zip(ours[1], exact[1]):
        assert a.dtype == torch.bfloat16
        assert float((a - b).abs().max()) < 3e-2 * float(b.abs().max())


def test_an_unembedding_that_remembers_its_output_keeps_it():
    """Soft-capped logits: tanh saves what it returned, which the gradient must not overwrite."""
    predicted, aims, _, plain = case(torch.float64)
    config = LossConfig(chunk=6, steps=3)
    capped = [f(predicted, aims, lambda s: 3 * (plain(s) / 3).tanh(), config) for f in (found, written_out)]
    assert torch.allclose(capped[0][1][0], capped[1][1][0], atol=1e-11)


def test_gradients_are_handed_over_once():
    """A second backward pass fails: it must not scale what the first one gave away."""
    predicted, aims, weight, unembed = case(torch.float64)
    total, *_ = vocabulary_losses(predicted, aims, unembed, LossConfig(), weight)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        total.backward()


# ---- each loss ----


def distributions(k=12):
    """Logits [4, V] that ask for gradients, and a target's distributions."""
    generator = torch.Generator().manual_seed(3)
    logits, theirs = (2 * torch.randn(4, k, generator=generator, dtype=torch.float64) for _ in range(2))
    return logits.requires_grad_(), theirs.softmax(-1)


def test_ranking_is_the_chance_of_the_targets_order_among_its_ten_best():
    """Drawn one after the other without replacement, each by its probability among those that are left."""
    logits, p = distributions()
    q = logits.detach().softmax(-1)
    for row, order in enumerate(p.argsort(-1, descending=True)[:, :10].tolist()):
        chance = 1.0
        for place, token in enumerate(order):
            chance *= float(q[row, token] / q[row, order[place:]].sum())
        assert float(losses.ranking(logits.detach(), p)[row]) == pytest.approx(-math.log(chance), rel=1e-12)
    assert torch.allclose(losses.ranking(logits + 5.0, p), losses.ranking(logits, p))


def test_top_k_is_the_cross_entropy_where_the_vocabulary_has_ten_tokens():
    logits, p = distributions(10)
    assert torch.allclose(losses.top_k(logits, p), soft_cross_entropy(logits, p))
    logits, p = distributions(12)
    least = p.topk(2, largest=False).indices
    rest = (p * logits.log_softmax(-1)).gather(1, least).sum(-1)
    assert torch.allclose(losses.top_k(logits, p), soft_cross_entropy(logits, p) + rest)


def test_acceptance_is_the_chance_that_a_drawn_token_is_accepted():
    """Half of the total variation is what is rejected; of a sure target it is the cross-entropy."""
    logits, p = distributions()
    assert torch.allclose((-losses.acceptance(logits, p)).exp(), 1 - total_variation(logits, p) / 2)
    sure = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 1]), 12).double()
    assert torch.allclose(losses.acceptance(logits, sure), soft_cross_entropy(logits, sure))
    assert float(losses.acceptance(p.log(), p).abs().max()) < 1e-12


@pytest.mark.parametrize("name", ["ranking", "top_k", "acceptance"])
def test_gradients_are_those_of_finite_differences(name):
    logits, p = distributions()
    term = getattr(losses, name)
    assert torch.autograd.gradcheck(lambda x: term(x, p), logits)


@pytest.mark.parametrize("name", ["ranking", "top_k", "acceptance"])
def test_a_draft_without_any_overlap_has_a_finite_loss_and_gradient(name):
    """In fp32, where the target's tokens get probability 0 and the written-out gradient might divide by it."""
    predicted, aims, weight, unembed = case(torch.float32, spread=1000.0)
    config = LossConfig(chunk=6, steps=3, soft_ce=0.0, **{name: 20.0})
    total, gradients, *_ = found(predicted, aims, unembed, config, weight)
    assert torch.isfinite(total)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("far", [10.0, 20.0, 40.0, 60.0, 90.0])
def test_acceptance_has_a_true_gradient_however_little_is_accepted(far):
    """In fp32 against fp64, down to where nothing is left: roundings of 1 over a would be enormous.

    A gradient's entries are q times the share on the other side over a, which is at most 1.
    """
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    p = (2 * logits.roll(1, 0)).softmax(-1)
    p[:, 0] = 0.0
    p /= p.sum(-1, keepdim=True)
    logits[:, 0] += far
    config, of = LossConfig(soft_ce=0.0, acceptance=1.0), torch.arange(4)
    found = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype, copy=True)  # it is overwritten
        scratch = losses._Scratch(x.device)
        loss, _ = losses._logit_losses(x, p.to(dtype), None, of, config, True, scratch)
        assert torch.isfinite(loss).all()
        found.append(x.double())
    assert float((found[0] - found[1]).abs().max()) < 2e-5  # logits of 60 are rounded by 2e-6
    assert float(found[0].abs().max()) <= 1 + 1e-5
    assert all(bool(gradient.any()) == (far < 70) for gradient in found)  # below FLOOR there is none


def test_what_is_equally_likely_leans_to_neither_side():
    """s - <q, s> where <q, s> = 0.5 - 0.25."""
    q, apart = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.1, 0.0, -0.1]])
    assert losses._lean(q, apart).tolist() == [[0.75, -0.25, -1.25]]


def test_a_term_without_weight_is_not_computed(monkeypatch):
    def never(*_):
        raise AssertionError("computed")

    for name in ("_ranked_losses", "_accepted", "_best"):
        monkeypatch.setattr(losses, name, never)
    predicted, aims, weight, unembed = case(torch.float64)
    found(predicted, aims, unembed, LossConfig(total_variation=0.5), weight)


@pytest.mark.parametrize("name", TERMS)
def test_weights_are_at_least_0_and_not_all_of_them_0(name):
    with pytest.raises(ValueError, match=rf"loss\.{name}=-1"):
        LossConfig(**{name: -1.0})
    with pytest.raises(ValueError, match="every weight is 0"):
        LossConfig(soft_ce=0.0)
    assert LossConfig(**{"soft_ce": 0.0, name: 1.0})
