"""What goes wrong with one request stays with it: the others finish with the tokens of plain decoding."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.heads.eagle import Config, Head
from mmspec.loop import all_complete, generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.types import Request
from tests.tiny import llava, prompt


@pytest.fixture(scope="module")
def target():
    return llava()


def wanted(target, n=7):
    return [Request(f"r{i}", prompt(target, i, 3 + i % 5, images=i % 3), 18 - i, key=i) for i in range(n)]


def plainly(target, requests):
    return generate(target, requests, NullDrafter(), SkipPolicy(), GreedySampler())


def head(target):
    torch.manual_seed(1)
    return Head(Config().resolve(target.shape)).double().drafter(target, 2)


class Faulty:
    """A drafter that raises at given calls of one of its methods, and is itself everywhere else."""

    def __init__(self, inner, method, calls):
        self.inner, self.method, self.calls, self.count = inner, method, calls, 0
        self.taps = inner.taps

    def __getattr__(self, name):
        inner = getattr(self.inner, name)
        if name != self.method:
            return inner

        def call(*args):
            self.count += 1
            if self.count in self.calls:
                raise ZeroDivisionError(f"call {self.count}\nof {name}")
            return inner(*args)

        return call


def drafted(output):
    return any(action == "draft" for action, *_ in output.rounds)


@pytest.mark.parametrize("batch", [1, 3])
def test_requests_that_cannot_be_decoded_carry_their_error(target, batch):
    good = wanted(target)
    plain = plainly(target, good)
    broken = replace(good[2].prompt, pixels={"pixel_values": torch.zeros(2, 3, 5, 5, dtype=torch.float64)})
    bad = [
        Request("long", prompt(target, 3, 300, 0), 5),
        Request("image", broken, 5),
        Request("nothing", good[0].prompt, 0),
    ]
    mixed = [bad[0], good[0], good[1], bad[1], *good[2:5], bad[2], *good[5:]]
    outputs = {o.id: o for o in generate(target, mixed, head(target), FixedPolicy(3, 4), GreedySampler(), batch)}
    assert [outputs[r.id].tokens for r in good] == [o.tokens for o in plain]
    assert not any(outputs[r.id].error for r in good)
    for request in bad:
        output = outputs[request.id]
        assert (output.tokens, output.finish_reason) == ([], "error")
    assert "a prompt of 30" in outputs["long"].error
    assert "context of" in outputs["long"].error
    assert "max_new_tokens 0" in outputs["nothing"].error
    assert "\n" not in outputs["image"].error
    with pytest.raises(RuntimeError, match=r"request 'long': .* \(and 2 more\)"):
        all_complete(list(outputs.values()))


def test_a_run_of_nothing_but_bad_requests_ends(target):
    outputs = generate(
        target, [Request("long", prompt(target, 3, 300, 0), 5)], NullDrafter(), SkipPolicy(), GreedySampler()
    )
    assert outputs[0].finish_reason == "error"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["propose", "observe", "admit"])
def test_a_drafter_that_raises_costs_speed_and_nothing_else(target, method, batch):
    requests = wanted(target)
    plain = plainly(target, requests)
    faulty = Faulty(head(target), method, {3})
    outputs = generate(target, requests, faulty, FixedPolicy(3, 4), GreedySampler(), batch)
    assert faulty.count > 3, "the fault was not the last thing to happen"
    assert [o.tokens for o in outputs] == [o.tokens for o in plain]
    assert [o.finish_reason for o in outputs] == [o.finish_reason for o in plain]
    failed = [o for o in outputs if o.error]
    assert len(failed) == (1 if method == "admit" else batch)
    assert all(o.error == f"drafter: ZeroDivisionError: call 3 of {method}" for o in failed)
    assert all(drafted(o) for o in outputs if not o.error), "the drafter goes on with later requests"


def test_a_cancelled_request_ends_with_what_it_has(target):
    requests = [replace(r, cancel=threading.Event()) for r in wanted(target)]
    plain = plainly(target, wanted(target))
    requests[5].cancel.set()

    def stop_one(emission):
        if emission.request.id == "r1" and emission.action != "prefill":
            emission.request.cancel.set()

    args = (FixedPolicy(3, 4), GreedySampler(), 3)
    outputs = generate(target, requests, head(target), *args, on_emission=stop_one)
    assert [o.finish_reason for o in outputs if o.id in ("r1", "r5")] == ["cancelled", "cancelled"]
    assert outputs[5].tokens == []
    assert outputs[5].error is None
    assert 2 <= len(outputs[1].tokens) < len(plain[1].tokens)
    assert outputs[1].tokens == plain[1].tokens[: len(outputs[1].tokens)]
    others = [0, 2, 3, 4, 6]
    assert [outputs[i].tokens for i in others] == [plain[i].tokens for i in others]


def test_emissions_tell_every_token_once_and_who_chose_it(target):
    requests = wanted(target)
    told = defaultdict(list)
    outputs = generate(
        target,
        requests,
        head(target),
        FixedPolicy(3, 4),
        GreedySampler(),
        3,
        on_emission=lambda emission: told[emission.request.id].append(emission),
    )
    for output in outputs:
        parts = told[output.id]
        assert [t for part in parts for t in part.tokens] == output.tokens
        assert [part.action for part in parts] == ["prefill", *(action for action, *_ in output.rounds)]
        assert [part.accepted for part in parts[1:]] == [min(a, kept) for _, _, a, kept in output.rounds]
