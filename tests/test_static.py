"""Passes of fixed shape: the same tokens as passes of changing shapes, and buffers that go from one run to the next."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings
from collections import deque

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.targets import _static
from mmspec.targets._static import padded_nodes
from mmspec.tree import from_parents, root_only
from mmspec.types import Plan
from tests.drafters import Erratic, drafters, known_answers, make_head
from tests.families import FAMILIES, build, requests

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(autouse=True)
def narrow_windows(monkeypatch):
    """So narrow that answers of a few tokens leave one."""
    monkeypatch.setattr(_static, "WINDOW", 16)


def at_fixed_shapes(model):
    """A target of the same weights whose passes have fixed shapes."""
    twin = copy.copy(model)
    twin.static, twin._shelf = True, deque(maxlen=1)
    return twin


SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9)}
QUICK = [("llava", "sampled"), ("qwen3_vl", "greedy")]
"""Image rows alone; M-RoPE, and states added in several layers."""


@pytest.mark.parametrize(
    ("family", "sampler"),
    [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in itertools.product(FAMILIES, SAMPLERS)],
)
def test_fixed_shapes_change_no_token(family, sampler):
    model, draw = build(family), SAMPLERS[sampler]
    asked = requests(model, 4, 18)
    plain = generate(model, asked, NullDrafter(), SkipPolicy(), draw)
    model = at_fixed_shapes(model)
    for batch in (1, 3):
        for name, drafter in drafters(model, known_answers(asked, plain)).items():
            outputs = generate(model, asked, drafter, Erratic(3, 5), draw, batch)
            assert [o.tokens for o in outputs] == [o.tokens for o in plain], (name, batch)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_pass_of_fixed_shape_gives_the_outputs_of_the_changing_one(device):
    """Logits, states and tapped layers of ragged rows, windows and node counts apart, within rounding."""
    changing = build("llava", device=device)
    changing.static = False
    asked = requests(changing, 2, 1)
    results = []
    for model in (changing, at_fixed_shapes(changing)):
        state = model.open(2, 64)
        with torch.inference_mode():
            for row, request in enumerate(asked):
                model.prefill(state, row, request.prompt)
            tree = from_parents(
                torch.tensor([[5, 6, 7], [8, 9, 5]], device=device),
                torch.tensor([[-1, 0, 0], [-1, 0, 1]], device=device),
                2,
            )
            results.append(model.forward(state, tree, (1,)))
    dynamic, fixed = results
    assert fixed.logits.shape == dynamic.logits.shape
    for a, b in (
        (dynamic.logits, fixed.logits),
        (dynamic.last_hidden, fixed.last_hidden),
        (dynamic.hidden[1], fixed.hidden[1]),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_buffers_and_passes_are_kept_for_the_next_run_and_lent_once():
    model = at_fixed_shapes(build("llava"))
    one = requests(model, 1, 1)[0].prompt
    first, second = model.open(1, 40), model.open(1, 40)
    assert first.kv is not second.kv
    with torch.inference_mode():
        model.prefill(first, 0, one)
        model.forward(first, root_only(torch.tensor([5])))
    buffers, passes = first.kv, first.passes
    del first
    gc.collect()
    again = model.open(1, 40)
    assert again.kv is buffers
    assert again.passes is passes
    assert passes.known
    assert again.lengths == [0]
    assert again.lengths_device.tolist() == [0]
    del again
    gc.collect()
    assert model.open(2, 40).kv is not buffers, "made for another batch"


class Overwriting(_static.StaticPass):
    """Writes the outputs of every pass to one place, as a captured graph does."""

    kept = None

    def compute(self):
        out = super().compute()
        if self.kept is None:
            self.kept = out
        for name in ("logits", "last_hidden"):
            getattr(self.kept, name).copy_(getattr(out, name))
        for tap, states in out.hidden.items():
            self.kept.hidden[tap].copy_(states)
        return self.kept


class EveryFourth(FixedPolicy):
    """Drafts after three rounds without a draft."""

    rounds = 0

    def plan(self, sensed, remaining):
        self.rounds += 1
        full = super().plan(sensed, remaining)
        return full if self.rounds % 4 == 0 else Plan(0, (0,) * len(remaining))


@pytest.mark.parametrize("kind", ["eagle", "eagle3_small", "vispec"])
def test_what_is_drafted_after_skips_is_of_each_skip_though_passes_overwrite_their_outputs(kind, monkeypatch):
    model = at_fixed_shapes(build("llava"))
    drafter = make_head(kind, model).drafter(model, 3)
    asked, drafted, propose = requests(model, 2, 24), [], drafter.propose

    def noted(roots, plan):
        trees = propose(roots, plan)
        drafted[-1].append(trees.tokens.tolist())
        return trees

    monkeypatch.setattr(drafter, "propose", noted)
    for one in (_static.StaticPass, Overwriting):
        monkeypatch.setattr(_static, "StaticPass", one)
        model._shelf.clear()
        drafted.append([])
        generate(model, asked, drafter, EveryFourth(3, 5), GreedySampler(), 2)
    assert len(drafted[0]) > 2
    assert drafted[0] == drafted[1]


@pytest.mark.gpu
def test_graphs_are_captured_and_replayed_without_a_warning():
    model = build("llava", device="cuda")
    asked = requests(model, 3, 24)
    model.static = False
    plain = generate(model, asked, NullDrafter(), SkipPolicy(), GreedySampler())
    model = at_fixed_shapes(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = generate(model, asked, drafters(model, {})["eagle"], FixedPolicy(3, 5), GreedySampler())
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]
    passes = model.open(1, 20).passes
    assert passes
    assert passes.known
    assert all(one.graph for one in passes.known.values())


def test_few_shapes_are_enough():
    assert [padded_nodes(n) for n in (1, 2, 3, 5, 8, 9, 30, 60)] == [1, 2, 4, 8, 8, 16, 32, 64]
