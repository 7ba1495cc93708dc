"""What goes into a target of any family: positions, deep features, placeholders, folders, limits and refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoProcessor, MistralConfig

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.targets._facts import context_limit
from mmspec.targets._load import family_of
from mmspec.types import InputError
from tests.families import FAMILIES, LAYOUTS, MROPE, build, prompt, question, requests, save


def answers(target, wanted, batch=1):
    """Tokens of plain greedy decoding."""
    outputs = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler(), max_batch=batch)
    return [o.tokens for o in outputs]


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
    before = answers(target, wanted)
    target.model.model.rope_deltas = torch.tensor([[1000]])
    try:
        assert answers(target, wanted, batch=3) == before
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
    assert answers(loaded, again, batch=2) == answers(target, wanted, batch=2)


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
