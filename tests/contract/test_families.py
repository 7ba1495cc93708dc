"""Every target family: its own `generate`, sequential decoding, single-row states and fresh prefills all agree with us.

fp64, no exception. Each family runs in odd shapes, with images first, last, twice, side by side and not at all, of
sizes that give rows of one batch different position offsets.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections import deque

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.sampling import KeyedSampler, gumbel_noise, make_sampler
from mmspec.tree import from_parents, root_only
from mmspec.types import Accepted, Prompt, Request
from tests.families import (
    CASES,
    FAMILIES,
    LAYOUTS,
    MROPE,
    QUICK,
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

PROCESSORS = {
    "greedy": make_sampler(0.0),
    "repetition": make_sampler(0.0, repetition_penalty=1.05),
    "ngram": make_sampler(0.0, no_repeat_ngram=2),
    "both": make_sampler(0.0, repetition_penalty=1.3, no_repeat_ngram=3),
    "sampled": make_sampler(0.8, 20, 0.9, seed=3),
    "all": make_sampler(0.8, 20, 0.9, seed=3, repetition_penalty=1.05, no_repeat_ngram=3),
}
every_case = pytest.mark.parametrize(("family", "shape"), CASES)
quick_cases = pytest.mark.parametrize(
    ("family", "shape"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES]
)


def plain(target, wanted, draw=PROCESSORS["greedy"], batch=1):
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


class KeyedNoise(LogitsProcessor):
    """What makes an argmax a sample, as the last of transformers' processors."""

    def __init__(self, seed, key):
        self.seed, self.key = seed, key

    def __call__(self, input_ids, scores):
        key, position = torch.tensor([self.key]), torch.tensor([[input_ids.shape[1]]])
        return scores + gumbel_noise(self.seed, key, position, scores.shape[1], scores.dtype)[:, 0]


def settings_of(draw, key):
    """Our sampler as arguments of transformers' `generate`, which applies the penalties before what it is given."""
    warpers = []
    if isinstance(draw, KeyedSampler):
        warpers = [TemperatureLogitsWarper(draw.temperature), TopKLogitsWarper(draw.top_k)]
        warpers += [TopPLogitsWarper(draw.top_p), KeyedNoise(draw.seed, key)]
    return {
        "do_sample": False,
        "repetition_penalty": draw.penalties.repetition,
        "no_repeat_ngram_size": draw.penalties.no_repeat_ngram,
        "logits_processor": LogitsProcessorList(warpers),
    }


@quick_cases
@pytest.mark.parametrize("settings", PROCESSORS)
def test_plain_decoding_is_the_models_own_generate(family, shape, settings):
    """With images first, last, twice, side by side and not at all; with the same processors, noise included."""
    target, draw = build(family, **SHAPES[shape]), PROCESSORS[settings]
    wanted = [Request(l, prompt(target, i, l), 20, key=9 * i) for i, l in enumerate(LAYOUTS)]
    ours, model = plain(target, wanted, draw, batch=3), twin(target, "sdpa")
    for request, output in zip(wanted, ours):
        theirs = model.generate(**inputs(request.prompt), max_new_tokens=20, **settings_of(draw, request.key))
        assert theirs[0, len(request.prompt) :].tolist() == output.tokens, request.id
    if settings != "greedy":  # or the processors did nothing
        assert [o.tokens for o in plain(target, wanted, batch=3)] != [o.tokens for o in ours]


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


def commit_at_random(target, prompts, rounds, check):
    """Prefills, then rounds of random trees of which each row keeps the path to a node of its own choice.

    Args:
        check: called with (row, tokens since the prompt, logits) for each node of each tree.

    Returns:
        State, and the tokens committed since the prompt per row.
    """
    rng, vocab, B = random.Random(0), target.shape.vocab_size, len(prompts)
    state, kept, roots = target.open(B, 96), [[] for _ in prompts], []
    for b, one in enumerate(prompts):
        forward = target.prefill(state, b, one)
        roots.append(int(forward.logits[0, -1].argmax()))
        check(b, [], forward.logits[0, -1])
    for _ in range(rounds):
        tokens, parents, trees = random_trees(rng, roots, vocab)
        out = target.forward(state, trees)
        for b in range(B):
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
    return state, kept


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

    state, kept = commit_at_random(target, prompts, rounds=2, check=check)
    assert max(worst) < 1e-9
    assert len(worst) == 4 + 2 * 4 * 6
    assert len({len(tokens) for tokens in kept}) > 1, "rows committed different numbers of tokens"
    assert len(set(state.rope_delta.tolist())) == (4 if family in MROPE else 1)


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
def test_packed_rows_give_each_conversation_the_states_it_has_alone(family, shape):
    target = build(family, **SHAPES[shape])
    prompts, answers = zip(*[dialogue(target, seed, layout) for seed, layout in enumerate(LAYOUTS)])
    width = len(prompts[0]) + len(prompts[1])
    plain = target.teacher(prompts, answers, taps=(0, 2))
    packed = target.teacher(prompts, answers, taps=(0, 2), pack=width)
    assert len(packed.segment) < len(prompts)
    assert packed.segment.max() > 1
    assert not (packed.answer[~packed.valid]).any()
    found = {}
    for row, marks in enumerate(packed.segment):
        for number in range(1, int(marks.max()) + 1):
            here = marks == number
            found[tuple(packed.input_ids[row, here].tolist())] = row, here
    for b, (one, marks) in enumerate(zip(prompts, answers)):
        n, at = len(one), found[tuple(one.input_ids.tolist())]
        assert torch.equal(packed.answer[at], marks)
        assert torch.equal(packed.visual[at], one.visual)
        assert torch.equal(packed.embeds[at], plain.embeds[b, :n])
        assert (packed.last_hidden[at] - plain.last_hidden[b, :n]).abs().max() < 1e-9
        for tap in (0, 2):
            assert (packed.hidden[tap][at] - plain.hidden[tap][b, :n]).abs().max() < 1e-9
    with pytest.raises(ValueError, match="pack=8"):
        target.teacher(prompts, answers, mass_layers=(0,), pack=8)


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


@pytest.mark.parametrize("fixed", [False, True], ids=["changing", "fixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_visual_mass_of_a_node_is_that_of_its_path(family, fixed):
    """While decoding: of a prompt's end, and of every node of ragged rows, against the teacher's pass over its path."""
    target = copy.copy(build(family))
    target.static, target._shelf = fixed, deque(maxlen=1)
    prompts = [prompt(target, seed, layout) for seed, layout in enumerate(("none", "first", "two"))]
    tokens = torch.tensor([[5, 6, 7, 8, 9]] * 3) + torch.arange(3).unsqueeze(1)
    parents = torch.tensor([[-1, 0, 0, 1, 3]] * 3)

    def taught(row, nodes):
        ids = torch.cat([prompts[row].input_ids, tokens[row, nodes]])
        visual = torch.nn.functional.pad(prompts[row].visual, (0, len(nodes)))
        whole = Prompt(ids, visual, prompts[row].pixels)
        return float(target.teacher([whole], [torch.zeros_like(ids)], mass_layers=(1,)).visual_mass[0, -1, 0])

    with torch.inference_mode():
        state = target.open(3, 96, mass_layer=1)
        for row, one in enumerate(prompts):
            mass = target.prefill(state, row, one).visual_mass
            assert mass.shape == (1, 1)
            assert float(mass) == pytest.approx(taught(row, []), abs=1e-6)
        trees = from_parents(tokens, parents, 4)
        mass = target.forward(state, trees).visual_mass
        assert mass.shape == (3, 5)
        for row, node in itertools.product(range(3), range(5)):
            path = trees.ancestors[row, node].nonzero().flatten()
            assert float(mass[row, node]) == pytest.approx(taught(row, path), abs=1e-6)
    assert float(mass[0].max()) == 0.0
    assert float(mass[1:].min()) > 0.01
    assert target.forward(target.open(1, 32), root_only(torch.tensor([5]))).visual_mass is None


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
