"""bf16: the contracts of fp64, where rounding may turn a tie and nothing else.

Plain decoding runs the same kernels on one node; passes of other shapes round otherwise. So outputs may part where the
two best tokens are a few units in the last place (ulp) of their logit apart. Shares of identical outputs and the gaps
of first divergences are printed (`pytest -rP`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.metrics import first_divergence
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import KeyedSampler, make_sampler
from mmspec.types import Prompt
from tests.drafters import drafters, known_answers
from tests.families import FAMILIES, Audited, build, requests

SAMPLERS = {
    "greedy": make_sampler(0.0),
    # No top-k or top-p: a token that rounding lifts over the cut is chosen whatever its distance to the best one.
    "sampled": KeyedSampler(0.8, seed=3),
    "penalised": make_sampler(0.0, repetition_penalty=1.05),
}
NEAR = 4
"""ulp, of bf16 at the size of the best logit."""

BATCHES = (1, 4)
QUICK = [(family, "greedy", 4) for family in ("llava", "qwen2_5_vl")]

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
every_family = pytest.mark.parametrize("family", FAMILIES)


def plain(target, wanted, draw):
    return generate(target, wanted, NullDrafter(), SkipPolicy(), draw, want_gaps=True)


@torch.inference_mode()
def best_logit(target, prompt, tokens):
    """Behind the prompt and these tokens."""
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens, dtype=torch.long)])
    visual = torch.nn.functional.pad(prompt.visual, (0, len(tokens)))
    return float(target.prefill(target.open(1, len(ids)), 0, Prompt(ids, visual, prompt.pixels)).logits.max())


def divergences(target, wanted, truth, outputs):
    """Top-2 gap of plain decoding, in ulp, at the first token that differs of each output that does."""
    gaps = []
    for request, theirs, ours in zip(wanted, truth, outputs):
        assert ours.error is None
        at = first_divergence(ours.tokens, theirs.tokens)
        if at is not None:
            assert at < min(len(ours.tokens), len(theirs.tokens)), "the same tokens, and one of them ended"
            best = best_logit(target, request.prompt, theirs.tokens[:at])
            gaps.append(theirs.gaps[at] / (torch.finfo(target.dtype).eps * abs(best)))
    return gaps


@on_every_device
@pytest.mark.parametrize(
    ("family", "sampler", "batch"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in product(FAMILIES, SAMPLERS, BATCHES)],
)
def test_outputs_part_from_plain_decoding_at_near_ties_only(family, sampler, batch, device):
    target, draw = build(family, dtype="bfloat16", device=device), SAMPLERS[sampler]
    wanted = requests(target, 10, 16)
    truth = plain(target, wanted, draw)
    for name, drafter in drafters(target, known_answers(wanted, truth)).items():
        outputs = generate(target, wanted, drafter, FixedPolicy(3, 6), draw, max_batch=batch)
        gaps = divergences(target, wanted, truth, outputs)
        print(f"{name}: {10 - len(gaps)} of 10 identical, gaps {[round(g, 1) for g in gaps]} ulp")
        assert all(gap <= NEAR for gap in gaps), (name, gaps)


@on_every_device
@every_family
def test_after_every_commit_the_cache_is_near_a_fresh_prefill(family, device):
    target = Audited(build(family, dtype="bfloat16", device=device))
    wanted = requests(target, 6, 12)
    truth = known_answers(wanted, plain(target.inner, wanted, SAMPLERS["greedy"]))
    generate(target, wanted, drafters(target.inner, truth)["random_tree"], FixedPolicy(4, 9), SAMPLERS["greedy"], 4)
    assert target.n_audits > 5
    print(f"worst difference {target.worst:.4f} of the largest logit")
    assert target.worst < 16 * torch.finfo(torch.bfloat16).eps


@on_every_device
@every_family
def test_a_node_at_a_wrong_position_shows(family, device, monkeypatch):
    """The tolerances above have teeth: children that stand one position too far part at gaps beyond them."""
    target = build(family, dtype="bfloat16", device=device)
    wanted = requests(target, 10, 16)
    truth = plain(target, wanted, SAMPLERS["greedy"])
    oracle, right = drafters(target, known_answers(wanted, truth))["oracle"], target.forward

    def wrong(state, trees, taps=()):
        return right(state, replace(trees, depths=2 * trees.depths), taps)

    monkeypatch.setattr(target, "forward", wrong)
    outputs = generate(target, wanted, oracle, FixedPolicy(3, 6), SAMPLERS["greedy"])
    monkeypatch.undo()
    assert max(divergences(target, wanted, truth, outputs)) > 3 * NEAR
