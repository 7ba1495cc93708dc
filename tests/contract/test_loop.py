"""The law of the project: whatever drafts, whatever decides, the output equals plain decoding, token for token.

Random targets of every family and shape; drafters are an oracle, an adversary, chains and trees of chance, n-gram
lookup, and untrained heads. fp64, no exception; `test_half.py` has bf16.
"""

from __future__ import annotations

from itertools import product

import pytest

from mmspec.drafters.null import NullDrafter
from mmspec.heads.eagle import Config, Head
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler, make_sampler
from mmspec.types import Request
from tests.drafters import Erratic, drafters, known_answers
from tests.families import CASES, FAMILIES, LAYOUTS, QUICK, SHAPES, Audited, build, requests
from tests.families import prompt as family_prompt
from tests.tiny import llava, prompt

SAMPLERS = {
    "greedy": GreedySampler(),
    "sampled": KeyedSampler(0.8, top_p=0.9, seed=3),
    "penalised": make_sampler(0.0, repetition_penalty=1.05),
}
BATCHES = (1, 4)
EVERYTHING = [(*case, sampler, batch) for case, sampler, batch in product(CASES, SAMPLERS, BATCHES)]
COVERING = [(*c, s, BATCHES[(i + j) % 2]) for i, c in enumerate(sorted(QUICK)) for j, s in enumerate(SAMPLERS)]
"""Every family with every sampler, and each of those with either batch size."""


def plain(target, wanted, draw):
    return generate(target, wanted, NullDrafter(), SkipPolicy(), draw)


def assert_lossless(target, wanted, draw, batch, names=()):
    """With every drafter (or those of these names), under a constant policy and one that skips at random."""
    truth = plain(target, wanted, draw)
    assert len({tuple(output.tokens) for output in truth}) > 0.8 * len(wanted)
    for name, drafter in drafters(target, known_answers(wanted, truth)).items():
        for policy in (FixedPolicy(4, 9), Erratic(4, 9)) if name in (names or [name]) else ():
            got = generate(target, wanted, drafter, policy, draw, max_batch=batch)
            for ours, theirs in zip(got, truth):
                where = (name, type(policy).__name__, ours.id)
                assert ours.error is None, where
                assert (ours.tokens, ours.finish_reason) == (theirs.tokens, theirs.finish_reason), where


@pytest.mark.parametrize(("family", "shape", "sampler", "batch"), COVERING)
def test_every_drafter_and_policy_gives_the_tokens_of_plain_decoding(family, shape, sampler, batch):
    target = build(family, **SHAPES[shape])
    assert_lossless(target, requests(target, 6, 12), SAMPLERS[sampler], batch)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape", "sampler", "batch"), EVERYTHING)
def test_so_it_is_in_every_shape_with_every_sampler_and_batch(family, shape, sampler, batch):
    target = build(family, **SHAPES[shape])
    assert_lossless(target, requests(target, 11, 28), SAMPLERS[sampler], batch)


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_so_it_is_over_two_hundred_prompts(batch):
    """fp32; chains and trees of chance; 0 to 2 images, 1 to 23 words."""
    target = llava(dtype="float32")
    layouts = [list(LAYOUTS)[i % len(LAYOUTS)] for i in range(200)]
    prompts = [family_prompt(target, i, layout, 1 + 7 * i % 23) for i, layout in enumerate(layouts)]
    wanted = [Request(str(i), p, 12 + i % 7, key=i) for i, p in enumerate(prompts)]
    assert_lossless(target, wanted, SAMPLERS["greedy"], batch, ("coin_chain", "random_tree"))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_oracle_is_accepted_and_an_adversary_is_not(family):
    target = build(family)
    wanted = requests(target, 5, 9)
    known = drafters(target, known_answers(wanted, plain(target, wanted, GreedySampler())))
    for output in generate(target, wanted, known["oracle"], FixedPolicy(3, 3), GreedySampler(), max_batch=3):
        assert all(accepted == nodes for _, nodes, accepted, _ in output.rounds[:-1])
    for output in generate(target, wanted, known["adversary"], FixedPolicy(3, 3), GreedySampler(), max_batch=3):
        assert all(accepted == 0 for _, _, accepted, _ in output.rounds)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["coin_chain", "random_tree"])
def test_after_every_commit_the_cache_is_that_of_a_fresh_prefill(family, name):
    """Its length, and the logits of one step from it, while rows of a ragged batch end and are refilled."""
    target = Audited(build(family))
    wanted = requests(target, 6, 12)
    drafter = drafters(target.inner, known_answers(wanted, plain(target.inner, wanted, GreedySampler())))[name]
    outputs = generate(target, wanted, drafter, FixedPolicy(4, 9), GreedySampler(), max_batch=4)
    assert target.n_audits == sum(len(output.rounds[1:]) for output in outputs) >= 9
    assert len({accepted for output in outputs for _, _, accepted, _ in output.rounds}) > 2
    assert target.worst < 1e-12


def test_emitted_tokens_add_up_and_nothing_follows_a_stop():
    target = llava()
    wanted = requests(target, 12, 60)
    head = Head(Config().resolve(target.shape)).double().drafter(target, 2)
    for output in generate(target, wanted, head, FixedPolicy(3, 5), KeyedSampler(1.5), max_batch=4):
        assert 1 + sum(r[3] for r in output.rounds) == len(output.tokens)
        stops = [i for i, t in enumerate(output.tokens) if t in target.stop_ids]
        assert stops in ([], [len(output.tokens) - 1])
        assert (output.finish_reason == "stop") == bool(stops)


def test_the_context_limit_ends_an_answer():
    target = llava()
    long = prompt(target, 3, n_words=245, images=0)
    plain = generate(target, [Request("r", long, 50)], NullDrafter(), SkipPolicy(), GreedySampler())[0]
    head = Head(Config().resolve(target.shape)).double().drafter(target, 2)
    drafted = generate(target, [Request("r", long, 50)], head, FixedPolicy(4, 6), GreedySampler())[0]
    assert plain.tokens == drafted.tokens
    assert plain.finish_reason in ("context", "stop")
    assert len(long) + len(plain.tokens) <= target.max_length + 1


def test_gaps_tell_how_close_the_runner_up_was():
    target = llava()
    request = Request("r", prompt(target, 5), 12)
    output = generate(target, [request], NullDrafter(), SkipPolicy(), GreedySampler(), want_gaps=True)[0]
    assert len(output.gaps) == len(output.tokens)
    top = target.prefill(target.open(1, 64), 0, request.prompt).logits[0, -1].topk(2).values
    assert output.gaps[0] == pytest.approx(float(top[0] - top[1]))
