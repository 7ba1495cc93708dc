"""Memory: buffers are as large as their docstring says, and requests leave nothing behind."""

from __future__ import annotations

import gc

import pytest
import torch

from mmspec.drafters.pld import PromptLookupDrafter
from mmspec.heads.eagle import Config, Head
from mmspec.loop import generate
from mmspec.policy import FixedPolicy
from mmspec.sampling import GreedySampler, make_sampler
from mmspec.types import Request
from tests.tiny import llava, prompt


def live_bytes() -> int:
    """Bytes of all tensors that can be reached, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("batch", "n_kv_heads"), [(1, 2), (4, 1), (16, 4)])
def test_buffers_are_within_five_percent_of_the_closed_form(batch, n_kv_heads):
    target, n_slots = llava(n_kv_heads=n_kv_heads), 300
    head = Head(Config().resolve(target.shape)).double().drafter(target, 2)
    before = live_bytes()
    state = target.open(batch, n_slots)
    shape = target.shape
    closed = shape.n_layers * 2 * batch * shape.n_kv_heads * n_slots * shape.head_dim * 8
    assert state.kv.nbytes == closed
    assert live_bytes() - before <= 1.05 * closed
    before = live_bytes()
    head.open(batch, n_slots)
    one_layer = 2 * batch * shape.n_kv_heads * head.kv.capacity * shape.head_dim * 8
    waiting = batch * (shape.hidden_size + 2) * 8
    assert head.kv.nbytes == one_layer
    assert live_bytes() - before <= 1.05 * (one_layer + waiting)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "pld", "penalties"])
def test_a_thousand_requests_leave_nothing_behind(kind):
    target = llava()
    drafter = (
        PromptLookupDrafter() if kind == "pld" else Head(Config().resolve(target.shape)).double().drafter(target, 2)
    )
    sampler = make_sampler(0.0, repetition_penalty=1.1) if kind == "penalties" else GreedySampler()
    prompts = [prompt(target, i, 3 + i % 5, images=i % 2) for i in range(7)]

    def serve(n):
        requests = [Request(str(i), prompts[i % 7], 6, i) for i in range(n)]
        assert len(generate(target, requests, drafter, FixedPolicy(3, 4), sampler, 4)) == n
        return live_bytes()

    first = serve(50)
    assert max(serve(250) for _ in range(4)) <= first * 1.001
