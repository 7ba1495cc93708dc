"""Every target family: its own `generate`, sequential decoding, single-row states and fresh prefills all agree with us.

fp64, no exception. Each family runs in odd shapes, with images first, last, twice, side by side and not at all, of
sizes that give rows of one batch different position offsets.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.tree import from_parents, root_only
from mmspec.types import Accepted, Prompt, Request
from tests.drafters import Erratic, drafters, known_answers
from tests.families import (
    CASES,
    FAMILIES,
    LAYOUTS,
    MROPE,
    SHAPES,
    build,
    dialogue,
    image,
    inputs,
    prompt,
    question,
    requests,
    twin,
)

QUICK = {
    ("llava", "one_kv_head"),
    ("llava_next", "tied"),
    ("qwen2_vl", "one_kv_head"),
    ("qwen2_5_vl", "tied"),
    ("qwen3_vl", "wide_heads"),
}
SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9, seed=3)}
every_case = pytest.mark.parametrize(("family", "shape"), CASES)
quick_cases = pytest.mark.parametrize(
    ("family", "shape"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES]
)


def plain(target, wanted, draw=SAMPLERS["greedy"], batch=1):
    return generate(target, wanted, NullDrafter(), SkipPolicy(), draw, max_batch=batch)


# ---- what the other tests stand on ----


@every_case
def test_the_random_target_has_something_to_say(family, shape):
    """Continuations vary, and so do logits with the image and with its place: no contract here holds by chance."""
    target = build(family, **SHAPES[shape])
    wanted = requests(target, 5, 20)
    pairs = {pair for o in plain(target, wanted, batch=5) for pair in zip(o.tokens, o.tokens[1:])}
    assert len(pairs) >= 12
    messages, images = question(1, "first")
    moved = [{"role": "user", "content": messages[0]["content"][::-1]}]
    before, other, elsewhere = (
        target.prefill(target.open(1, 96), 0, target.encode(chat, pictures)).logits
        for chat, pictures in ((messages, images), (messages, [image(99, images[0].size)]), (moved, images))
    )
    assert (before - other).abs().max() > 0.1
    assert (before - elsewhere).abs().max() > 0.1


# ---- agreement with transformers ----


@quick_cases
@pytest.mark.parametrize("layout", LAYOUTS)
def test_plain_decoding_is_the_models_own_generate(family, shape, layout):
    target = build(family, **SHAPES[shape])
    wanted = [Request(str(seed), prompt(target, seed, layout), 16) for seed in (2, 3)]
    model = twin(target, "sdpa")
    for request, ours in zip(wanted, plain(target, wanted, batch=2)):
        theirs = model.generate(**inputs(request.prompt), max_new_tokens=16, do_sample=False)
        assert theirs[0, len(request.prompt) :].tolist() == ours.tokens


class Sequential:
    """The model's own forward on transformers' own cache and attention, token after token with explicit positions."""

    def __init__(self, target, prompt):
        self.model, self.length, self.mrope = twin(target, "sdpa"), len(prompt), target.name[7:] in MROPE
        fields, self.delta = inputs(prompt), 0
        positions = torch.arange(self.length).unsqueeze(0)
        if "image_grid_thw" in fields:
            given = {k: fields[k] for k in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
            positions, delta = self.model.model.get_rope_index(**given)
            self.delta = int(delta)
        out = self.model(**fields, position_ids=positions, use_cache=True)
        self.first, self.cache = out.logits[0, -1], out.past_key_values

    def logits(self, tokens):
        """After the prompt and these tokens, [V]."""
        cache, last = copy.deepcopy(self.cache), self.first
        for i, token in enumerate(tokens):
            at = torch.tensor([[self.length + i + self.delta]])
            out = self.model(
                input_ids=torch.tensor([[token]]),
                position_ids=at.expand(3, 1, 1) if self.mrope else at,
                past_key_values=cache,
                use_cache=True,
            )
            last = out.logits[0, -1]
        return last


def random_trees(rng, roots, vocab, n_nodes=6):
    tokens = [[root, *rng.sample(range(vocab), n_nodes - 1)] for root in roots]
    parents = [[-1, *[rng.randrange(i) for i in range(1, n_nodes)]] for _ in roots]
    return tokens, parents, from_parents(torch.tensor(tokens), torch.tensor(parents), n_nodes)


def path_to(parents, node):
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


def commit_at_random(target, prompts, rounds, check=None):
    """Prefills, then rounds of random trees of which each row keeps the path to a node of its own choice.

    Args:
        check: called with (row, tokens since the prompt, logits) for each node of each tree.

    Returns:
        State, tokens committed since the prompt per row, and the roots that are next.
    """
    rng, vocab, B = random.Random(0), target.shape.vocab_size, len(prompts)
    state, kept, roots = target.open(B, 96), [[] for _ in prompts], []
    for b, one in enumerate(prompts):
        forward = target.prefill(state, b, one)
        roots.append(int(forward.logits[0, -1].argmax()))
        if check:
            check(b, [], forward.logits[0, -1])
    for _ in range(rounds):
        tokens, parents, trees = random_trees(rng, roots, vocab)
        out = target.forward(state, trees)
        for b in range(B) if check else ():
            for node in range(len(tokens[b])):
                check(b, kept[b] + [tokens[b][i] for i in path_to(parents[b], node)], out.logits[b, node])
        paths = [path_to(parents[b], rng.randrange(len(tokens[b]))) for b in range(B)]
        longest = max(map(len, paths))
        padded = torch.tensor([p + [0] * (longest - len(p)) for p in paths])
        roots = [rng.randrange(vocab) for _ in prompts]
        counts = torch.tensor([len(p) for p in paths])
        target.keep(state, Accepted(padded, counts, torch.zeros_like(padded)), paths)
        for b, path in enumerate(paths):
            kept[b] += [tokens[b][i] for i in path]
    return state, kept, roots


def ragged_prompts(target):
    """Four rows of different lengths and, with M-RoPE, different offsets."""
    return [prompt(target, s, layout, 2 + s) for layout, s in (("first", 0), ("last", 3), ("two", 1), ("none", 2))]


@quick_cases
@torch.inference_mode()
def test_tree_logits_are_those_of_sequential_decoding(family, shape):
    """In rows of different offsets, before and after ragged commits."""
    target = build(family, **SHAPES[shape])
    prompts = ragged_prompts(target)
    reference = [Sequential(target, p) for p in prompts]
    worst = []

    def check(b, tokens, logits):
        worst.append(float((logits - reference[b].logits(tokens)).abs().max()))

    state, kept, _ = commit_at_random(target, prompts, rounds=2, check=check)
    assert max(worst) < 1e-9
    assert len(worst) == 4 + 2 * 4 * 6
    assert len({len(tokens) for tokens in kept}) > 1, "rows committed different numbers of tokens"
    assert len(set(state.rope_delta.tolist())) == (4 if family in MROPE else 1)


@quick_cases
@torch.inference_mode()
def test_a_step_from_the_committed_cache_is_a_fresh_prefill(family, shape):
    target = build(family, **SHAPES[shape])
    prompts = ragged_prompts(target)
    state, kept, roots = commit_at_random(target, prompts, rounds=3)
    step = target.forward(state, root_only(torch.tensor(roots)))
    for b, (one, tokens) in enumerate(zip(prompts, kept)):
        assert state.lengths[b] == int(state.lengths_device[b]) == len(one) + len(tokens)
        ids = torch.cat([one.input_ids, torch.tensor([*tokens, roots[b]])])
        visual = torch.nn.functional.pad(one.visual, (0, len(tokens) + 1))
        fresh = target.prefill(target.open(1, 96), 0, Prompt(ids, visual, one.pixels))
        assert (step.logits[b, 0] - fresh.logits[0, 0]).abs().max() < 1e-9


# ---- losslessness ----


@quick_cases
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_drafter_gives_the_tokens_of_plain_decoding(family, shape, sampler):
    """In a ragged batch of four that is refilled."""
    target, draw = build(family, **SHAPES[shape]), SAMPLERS[sampler]
    wanted = requests(target, 6, 12)
    truth = plain(target, wanted, draw)
    for name, drafter in drafters(target, known_answers(wanted, truth)).items():
        got = generate(target, wanted, drafter, FixedPolicy(3, 6), draw, max_batch=4)
        assert [o.tokens for o in got] == [o.tokens for o in truth], name


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("batch", [1, 4])
def test_every_drafter_and_policy_gives_the_tokens_of_plain_decoding(family, shape, sampler, batch):
    target, draw = build(family, **SHAPES[shape]), SAMPLERS[sampler]
    wanted = requests(target, 11, 28)
    truth = plain(target, wanted, draw)
    for name, drafter in drafters(target, known_answers(wanted, truth)).items():
        for policy in (FixedPolicy(4, 9), Erratic(4, 9)):
            got = generate(target, wanted, drafter, policy, draw, max_batch=batch)
            for ours, theirs in zip(got, truth):
                assert ours.tokens == theirs.tokens, (name, type(policy).__name__, ours.id)
                assert ours.finish_reason == theirs.finish_reason


@pytest.mark.parametrize("family", FAMILIES)
def test_an_oracle_is_accepted_and_an_adversary_is_not(family):
    target = build(family)
    wanted = requests(target, 5, 9)
    truth = plain(target, wanted)
    known = drafters(target, known_answers(wanted, truth))
    for output in generate(target, wanted, known["oracle"], FixedPolicy(3, 3), GreedySampler(), max_batch=3):
        assert all(accepted == nodes for _, nodes, accepted, _ in output.rounds[:-1])
    for output in generate(target, wanted, known["adversary"], FixedPolicy(3, 3), GreedySampler(), max_batch=3):
        assert all(accepted == 0 for _, _, accepted, _ in output.rounds)


# ---- training's view ----


@every_case
def test_teacher_states_are_those_of_single_prefills(family, shape):
    target = build(family, **SHAPES[shape])
    pairs = [dialogue(target, seed, layout) for seed, layout in enumerate(LAYOUTS)]
    prompts, answers = zip(*pairs)
    taps = (0, 1, 2, 3)
    features = target.teacher(prompts, answers, taps=taps)
    assert len({len(p) for p in prompts}) > 2
    for b, one in enumerate(prompts):
        n = len(one)
        with torch.inference_mode():
            single = target.prefill(target.open(1, 128), 0, one, taps)
        assert features.valid[b].sum() == n
        assert torch.equal(features.visual[b, :n], one.visual)
        assert torch.equal(features.embeds[b, :n], single.embeds[0])
        assert (features.last_hidden[b, :n] - single.last_hidden[0]).abs().max() < 1e-9
        for tap in taps:
            assert (features.hidden[tap][b, :n] - single.hidden[tap][0]).abs().max() < 1e-9


@every_case
def test_visual_mass_is_that_of_eager_attention(family, shape):
    """Grouped heads and right padding included; eager weights come from the model's own forward."""
    target = build(family, **SHAPES[shape])
    prompts, answers = zip(*[dialogue(target, seed, layout) for seed, layout in enumerate(LAYOUTS)])
    layers = (0, 2)
    mass = target.teacher(prompts, answers, mass_layers=layers).visual_mass
    model = twin(target, "eager")
    for b, one in enumerate(prompts):
        with torch.no_grad():
            weights = model(**inputs(one), output_attentions=True).attentions
        for s, layer in enumerate(layers):
            wanted = (weights[layer][0].mean(0) * one.visual).sum(-1)
            assert (mass[b, : len(one), s] - wanted).abs().max() < 1e-5
    assert mass[0].abs().max() == 0, "a prompt without an image has no visual mass"
    assert mass[1:].max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_marked_where_they_stand(family):
    target = build(family)
    for seed, layout in enumerate(LAYOUTS):
        one, answer = dialogue(target, seed, layout)
        for reply in (1, 2):
            marked = one.input_ids[answer == reply].tolist()
            assert target.decode(marked).split()[-3:] == [f"w{seed}", "w3", "w7"]
            assert marked[-1] in target.stop_ids
        assert not (one.visual & (answer > 0)).any()
