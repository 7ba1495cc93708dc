"""The law of the project: whatever drafts, whatever decides, the output equals plain decoding, token for token.

fp64, no exception. Targets are random; drafters are an oracle, an adversary, random trees, and an untrained head.
"""

from __future__ import annotations

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.heads.eagle import Config, Head
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.tree import from_parents, root_only
from mmspec.types import Request
from tests.drafters import Erratic, drafters, known_answers
from tests.tiny import llava, prompt

SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9, seed=3)}
SHAPES = {"grouped": {}, "one_kv_head": {"n_kv_heads": 1}, "tied_wide_heads": {"tie": True, "head_dim": 12}}


def requests(target, n=9, new=24):
    """Ragged prompts: no image, one, two; 3 to 7 words; different lengths wanted."""
    return [Request(f"r{i}", prompt(target, i, 3 + i % 5, images=i % 3), new - i % 4, key=17 * i) for i in range(n)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_drafter_and_policy_gives_the_tokens_of_plain_decoding(shape, sampler):
    target = llava(**SHAPES[shape])
    wanted = requests(target)
    draw = SAMPLERS[sampler]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    truth = known_answers(wanted, plain)
    for name, drafter in drafters(target, truth).items():
        for policy in (FixedPolicy(4, 9), Erratic(4, 9)):
            for batch in (1, 4):
                got = generate(target, wanted, drafter, policy, draw, max_batch=batch)
                for a, b in zip(plain, got):
                    assert a.tokens == b.tokens, (name, type(policy).__name__, batch, a.id)
                    assert a.finish_reason == b.finish_reason


@pytest.mark.parametrize("images", [0, 1, 2])
def test_plain_decoding_is_the_models_own_generate(images):
    target = llava()
    request = Request("r", prompt(target, 5, images=images), 30)
    ours = generate(target, [request], NullDrafter(), SkipPolicy(), GreedySampler())[0]
    ids = request.prompt.input_ids[None]
    pixels = {k: v.double() for k, v in request.prompt.pixels.items()}
    theirs = target.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, **pixels
    )
    assert theirs[0, ids.shape[1] :].tolist() == ours.tokens


def test_oracle_accepts_everything_and_adversary_nothing():
    target = llava()
    wanted = requests(target, new=21)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    truth = known_answers(wanted, plain)
    known = drafters(target, truth)
    for output in generate(target, wanted, known["oracle"], FixedPolicy(4, 4), GreedySampler(), max_batch=3):
        assert all(accepted == nodes for _, nodes, accepted, _ in output.rounds[:-1])
    for output in generate(target, wanted, known["adversary"], FixedPolicy(4, 4), GreedySampler(), max_batch=3):
        assert all(accepted == 0 for _, _, accepted, _ in output.rounds)


def test_emitted_tokens_add_up_and_nothing_follows_a_stop():
    target = llava()
    wanted = requests(target, n=12, new=60)
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


def test_the_committed_cache_equals_a_fresh_prefill():
    """A10.3: after ragged commits, one more step gives the logits of a fresh run over the same tokens (fp64: 1e-9)."""
    target = llava()
    state = target.open(2, 64)
    rows = [prompt(target, 1, 4, 1), prompt(target, 2, 6, 0)]
    forwards = [target.prefill(state, b, p) for b, p in enumerate(rows)]
    root = torch.stack([f.logits[0, -1].argmax() for f in forwards])
    tree = from_parents(
        torch.stack([root, torch.tensor([5, 6]), torch.tensor([8, 9]), torch.tensor([10, 11])], 1),
        torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2]]),
        3,
    )
    from mmspec.types import Accepted, Prompt

    target.forward(state, tree)
    paths = ((0, 2, 3), (0, 1))
    target.keep(
        state,
        Accepted(torch.tensor([[0, 2, 3], [0, 1, 0]]), torch.tensor([3, 2]), torch.tensor([[8, 10, 20], [6, 21, 0]])),
        paths,
    )
    step = target.forward(state, root_only(torch.tensor([20, 21])))
    for b, (p, path) in enumerate(zip(rows, paths)):
        ids = torch.cat([p.input_ids, tree.tokens[b, list(path)], torch.tensor([20 + b])])
        visual = torch.cat([p.visual, torch.zeros(len(ids) - len(p), dtype=torch.bool)])
        fresh = target.prefill(target.open(1, 64), 0, Prompt(ids, visual, p.pixels))
        assert torch.allclose(step.logits[b, 0], fresh.logits[0, 0], atol=1e-9, rtol=0)


def test_gaps_tell_how_close_the_runner_up_was():
    target = llava()
    request = Request("r", prompt(target, 5), 12)
    output = generate(target, [request], NullDrafter(), SkipPolicy(), GreedySampler(), want_gaps=True)[0]
    assert len(output.gaps) == len(output.tokens)
    top = target.prefill(target.open(1, 64), 0, request.prompt).logits[0, -1].topk(2).values
    assert output.gaps[0] == pytest.approx(float(top[0] - top[1]))
