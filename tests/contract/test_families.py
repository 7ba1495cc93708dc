"""Every target family: its own `generate`, sequential decoding, single-row states and fresh prefills all agree with us.

fp64, no exception. Each family runs in odd shapes, with images first, last, twice, side by side and not at all, of
sizes that give rows of one batch different position offsets.
"""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from transformers import AutoProcessor, MistralConfig

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.targets import load_target
from mmspec.targets._load import family_of
from mmspec.targets.base import context_limit
from mmspec.tree import from_parents, root_only
from mmspec.types import Accepted, InputError, Prompt, Request
from tests.drafters import Erratic, drafters, known_answers
from tests.families import (
    CASES,
    FAMILIES,
    LAYOUTS,
    SHAPES,
    build,
    dialogue,
    image,
    inputs,
    prompt,
    question,
    save,
    twin,
)

QUICK = {
    ("llava", "one_kv_head"),
    ("llava_next", "tied"),
    ("qwen2_vl", "one_kv_head"),
    ("qwen2_5_vl", "tied"),
    ("qwen3_vl", "wide_heads"),
}
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9, seed=3)}
every_case = pytest.mark.parametrize(("family", "shape"), CASES)
quick_cases = pytest.mark.parametrize(
    ("family", "shape"), [pytest.param(*c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CASES]
)


def requests(target, n, new):
    """Every layout in turn, ragged in words, images and tokens wanted."""
    layouts = list(LAYOUTS)
    prompts = [prompt(target, i, layouts[i % len(layouts)], 3 + i % 4) for i in range(n)]
    return [Request(f"r{i}", p, new - i % 4, key=17 * i) for i, p in enumerate(prompts)]


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
        target.keep(state, Accepted(padded, counts, torch.tensor(roots)), paths)
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


# ---- positions and deep features ----


@pytest.mark.parametrize("family", MROPE)
def test_an_image_advances_positions_by_its_longer_side(family):
    target = build(family)
    for seed, layout in enumerate(LAYOUTS):
        one = prompt(target, seed, layout)
        positions, delta = target.prompt_positions(one)
        grids = one.pixels.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))[:, 1:] // 2
        assert delta == sum(int(g.max()) - int(g.prod()) for g in grids)
        assert positions.shape == (3, 1, len(one))
        assert positions.max() + 1 == len(one) + delta
        text = positions[:, 0, ~one.visual]
        assert torch.equal(text[0], text[1])
        assert torch.equal(text[0], text[2])
        assert len(grids) == 0 or not torch.equal(positions[1], positions[2])


@pytest.mark.parametrize("family", MROPE)
def test_the_delta_a_model_keeps_is_never_used(family):
    target = build(family)
    wanted = requests(target, 3, 6)
    before = plain(target, wanted)
    target.model.model.rope_deltas = torch.tensor([[1000]])
    try:
        assert [o.tokens for o in plain(target, wanted, batch=3)] == [o.tokens for o in before]
        assert target.model.model.rope_deltas.item() == 1000
    finally:
        target.model.model.rope_deltas = None


def test_deep_features_change_what_the_text_model_sees(monkeypatch):
    """qwen3_vl agrees with its own `generate` above; here: that agreement depends on them."""
    target = build("qwen3_vl")
    one = prompt(target, 1, "two")
    full = target.prefill(target.open(1, 64), 0, one, taps=(0, 1, 2, 3))
    monkeypatch.setattr(target, "deep_inputs", lambda visual, features: {})
    bare = target.prefill(target.open(1, 64), 0, one, taps=(0, 1, 2, 3))
    difference = [(full.hidden[k] - bare.hidden[k]).abs().amax(-1)[0] for k in (0, 1, 2)]
    assert torch.equal(difference[0], torch.zeros(len(one), dtype=torch.float64))
    assert (difference[1][one.visual] > 0).all()
    assert not difference[1][~one.visual].any(), "the first level reaches image positions only"
    assert (full.logits - bare.logits).abs().max() > 1e-3


# ---- prompts, folders, limits ----


@pytest.mark.parametrize("family", MROPE)
def test_one_placeholder_per_merged_patch(family):
    target = build(family)
    for layout in LAYOUTS:
        one = prompt(target, 3, layout)
        grid = one.pixels.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long))
        assert int(one.visual.sum()) == sum(int(g.prod()) // 4 for g in grid)
        runs = (one.visual.int().diff(prepend=torch.zeros(1, dtype=torch.int)) == 1).nonzero().flatten().tolist()
        assert len(runs) == len(grid)
        start = target.processor.tokenizer.convert_tokens_to_ids("<|vision_start|>")
        assert all(int(one.input_ids[at - 1]) == start for at in runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_video_and_missing_images_are_refused(family):
    target = build(family)
    video = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "w1"}]}]
    with pytest.raises(InputError, match="'video' content cannot be encoded"):
        target.encode(video, [])
    messages, images = question(1, "two")
    with pytest.raises(ValueError, match=r"image"):
        target.encode(messages, images[:1])


@pytest.mark.parametrize(
    ("family", "template"),
    [*[(f, "jinja") for f in FAMILIES], *[(f, "json") for f in MROPE]],
)
def test_a_saved_folder_is_the_same_target(family, template, tmp_path):
    target = build(family, tie=True)
    save(target, tmp_path)
    if template == "json":
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": target.processor.chat_template}))
    loaded = load_target(str(tmp_path), "float64")
    assert type(loaded) is family_of(family)
    assert loaded.fingerprint == target.fingerprint
    assert loaded.shape == target.shape
    assert loaded.stop_ids == target.stop_ids
    wanted = requests(target, 5, 6)
    again = requests(loaded, 5, 6)
    for a, b in zip(wanted, again):
        assert torch.equal(a.prompt.input_ids, b.prompt.input_ids)
        assert all(torch.equal(a.prompt.pixels[k], b.prompt.pixels[k]) for k in a.prompt.pixels)
    assert [o.tokens for o in plain(loaded, again, batch=2)] == [o.tokens for o in plain(target, wanted, batch=2)]


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_folder_in_the_layout_of_public_checkpoints_is_read(family, tmp_path):
    """Text settings at the top of config.json, pixel limits by their old names, a tokenizer template without images."""
    target = build(family, tie=True)
    save(target, tmp_path)

    def flat(config):
        text, vision = config.pop("text_config"), config["vision_config"]
        rope = text.pop("rope_parameters")
        for key in ("model_type", "dtype", "layer_types"):
            text.pop(key, None)
        vision.pop("model_type")
        scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        return text | config | {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}

    def limits(settings):
        size = settings.pop("size")
        old = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        return settings | old | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}

    edit(tmp_path / "config.json", flat)
    edit(tmp_path / "preprocessor_config.json", limits)
    edit(tmp_path / "tokenizer_config.json", lambda c: c | {"chat_template": "text only"})
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": target.processor.chat_template}))
    loaded = load_target(str(tmp_path), "float64")
    assert loaded.fingerprint == target.fingerprint
    one, other = prompt(target, 1, "two"), prompt(loaded, 1, "two")
    assert torch.equal(one.input_ids, other.input_ids)
    logits = [t.prefill(t.open(1, 96), 0, p).logits for t, p in ((target, one), (loaded, other))]
    assert (logits[0] - logits[1]).abs().max() < 1e-9


@pytest.mark.parametrize("family", MROPE)
def test_the_composed_processor_is_the_auto_processor(family, tmp_path):
    pytest.importorskip("torchvision")
    target = build(family)
    save(target, tmp_path)
    kind = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family]
    edit(tmp_path / "preprocessor_config.json", lambda c: c | {"processor_class": kind})
    ours, theirs = load_target(str(tmp_path), "float64").processor, AutoProcessor.from_pretrained(tmp_path)
    for seed, layout in enumerate(LAYOUTS):
        messages, images = question(seed, layout)
        text = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        a = ours(text=[text], images=images or None, return_tensors="pt")
        b = theirs(text=[text], images=images or None, return_tensors="pt")
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_stop_ids_join_the_generation_config_and_the_tokenizer():
    target = build("qwen2_5_vl")
    tokens = target.processor.tokenizer
    assert target.stop_ids == set(tokens.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    model = copy.deepcopy(target.model)
    model.generation_config.eos_token_id = tokens.convert_tokens_to_ids("<|endoftext|>")
    assert family_of("qwen2_5_vl")(model, target.processor, "other").stop_ids == target.stop_ids


def test_a_sliding_window_ends_the_context_and_other_layers_are_refused():
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
    assert context_limit(MistralConfig(**shape, sliding_window=None)) == 256
    assert context_limit(MistralConfig(**shape, sliding_window=64)) == 64
    strange = MistralConfig(**shape, sliding_window=None)
    strange.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(InputError, match="linear_attention"):
        context_limit(strange)
