"""The law of the project: whatever drafts, whatever decides, the output equals plain decoding, token for token.

fp64, no exception. Targets are random; drafters are an oracle, an adversary, random trees, and an untrained head.
"""

from __future__ import annotations

import random

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.heads.eagle import Config, Head
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.tree import from_parents, root_only
from mmspec.types import Plan, Request
from tests.tiny import VOCAB, llava, prompt

SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9, seed=3)}
SHAPES = {"grouped": {}, "one_kv_head": {"n_kv_heads": 1}, "tied_wide_heads": {"tie": True, "head_dim": 12}}


def requests(target, n=9, new=24):
    """Ragged prompts: no image, one, two; 3 to 7 words; different lengths wanted."""
    return [Request(f"r{i}", prompt(target, i, 3 + i % 5, images=i % 3), new - i % 4, key=17 * i) for i in range(n)]


class Scripted:
    """Drafts from known continuations: `twist` turns the true next token into what is proposed."""

    taps = ()

    def __init__(self, truth, twist, width=1):
        self.truth, self.twist, self.width = truth, twist, width

    def open(self, max_batch, max_tokens):
        self.row = [None] * max_batch

    def admit(self, row, request, forward, root):
        self.row[row] = [tuple(request.prompt.input_ids.tolist()), 0]

    def evict(self, row):
        self.row[row] = None

    def observe(self, round):
        for row, path in enumerate(round.paths):
            if self.row[row]:
                self.row[row][1] += len(path)

    def propose(self, roots, plan):
        tokens, parents = roots[:, None].tolist(), [[-1] for _ in roots]
        for b, state in enumerate(self.row):
            spine = 0
            for depth in range(plan.depth):
                true = 3
                if state:
                    answer = self.truth[state[0]]
                    true = answer[min(state[1] + depth + 1, len(answer) - 1)]
                siblings = [self.twist(true, depth)] + [(true + 5 + j) % VOCAB for j in range(self.width - 1)]
                first = len(tokens[b])
                for token in dict.fromkeys(siblings):
                    tokens[b].append(token)
                    parents[b].append(spine)
                spine = first
            limit = plan.budget[b] + 1
            parents[b] = [p if i < limit else -1 for i, p in enumerate(parents[b])]
        width = max(map(len, tokens))
        for b in range(len(tokens)):
            parents[b] += [-1] * (width - len(tokens[b]))
            tokens[b] += [0] * (width - len(tokens[b]))
        return from_parents(torch.tensor(tokens), torch.tensor(parents), max(plan.depth, 1))


class Erratic(FixedPolicy):
    """Skips rounds and rows at random: a skip must never change a token."""

    def open(self, max_batch, device):
        self.rng = random.Random(0)

    def plan(self, sensed, remaining):
        full = super().plan(sensed, remaining)
        if self.rng.random() < 0.4 or not full.depth:
            return Plan(0, (0,) * len(remaining))
        return Plan(self.rng.randint(1, full.depth), tuple(self.rng.choice([0, 2, b]) if b else 0 for b in full.budget))


def drafters(target, truth):
    torch.manual_seed(1)
    return {
        "null": NullDrafter(),
        "oracle": Scripted(truth, lambda true, depth: true),
        "adversary": Scripted(truth, lambda true, depth: (true + 1) % VOCAB),
        "half_right_tree": Scripted(truth, lambda true, depth: true if depth < 2 else (true + 1) % VOCAB, width=3),
        "head": Head(Config().resolve(target.shape)).double().drafter(target, 3),
        "head_chain": Head(Config().resolve(target.shape)).double().drafter(target, 1),
    }


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_drafter_and_policy_gives_the_tokens_of_plain_decoding(shape, sampler):
    target = llava(**SHAPES[shape])
    wanted = requests(target)
    draw = SAMPLERS[sampler]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    truth = {tuple(r.prompt.input_ids.tolist()): o.tokens for r, o in zip(wanted, plain)}
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
    truth = {tuple(r.prompt.input_ids.tolist()): o.tokens for r, o in zip(wanted, plain)}
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


def test_a_prompt_beyond_the_context_is_refused():
    target = llava()
    with pytest.raises(ValueError, match="leave no token to decode"):
        generate(target, [Request("r", prompt(target, 3, 300, 0), 5)], NullDrafter(), SkipPolicy(), GreedySampler())


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
        state, Accepted(torch.tensor([[0, 2, 3], [0, 1, 0]]), torch.tensor([3, 2]), torch.tensor([20, 21])), paths
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
