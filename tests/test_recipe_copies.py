"""Recipes of public targets: each trains, by the real command, and decodes losslessly on a small copy of its target."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmspec import checkpoint
from mmspec.api import drafter_and_policy
from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import SkipPolicy
from mmspec.recipe import Recipe, load
from mmspec.sampling import GreedySampler
from mmspec.targets import load_target
from mmspec.types import Request
from scripts import write_recipes
from tests import copies
from tests.training import losses

STEPS = 20
QUICK = (
    "eagle3_llava7b", "msd_llava13b", "vispec_llava_next_7b", "medusa_qwen2_5_vl_3b", "msd_qwen2_5_vl_7b",
    "viskip_qwen3_vl_4b", "vispec_qwen3_vl_8b",
)  # fmt: skip
"""Every head and every target at least once, where all of them would take too long."""
RECIPES = [
    pytest.param(name := f"{head}_{target}", marks=[] if name in QUICK else pytest.mark.slow)
    for target in write_recipes.TARGETS
    for head in write_recipes.HEADS
]


def path_of(name: str) -> Path:
    return write_recipes.RECIPES / f"{name}.yaml"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and the copies that were made so far."""
    folder = tmp_path_factory.mktemp("copies")
    copies.save_data(folder / "data")
    return folder


def changes(recipe: Recipe, target: Path, width: int, places: Path) -> list[str]:
    """What a copy needs changed: places, amounts, and sizes that only the public target has room for."""
    data = places / "data" / "data.json"
    # Wide ones bear less; Medusa's blocks start at zero and move little.
    rate = (1.0 if recipe.head.kind == "medusa" else 0.1) / width
    said = [
        f"target.name={target}", "target.dtype=float32", "deepspeed.bf16=false",
        f"data.sources=[{{path: {data}}}]", "data.decontaminated=null", "data.max_new_tokens=6", "data.answer_batch=4",
        "data.drop=[]", f"data.answers_dir={places / 'answers'}",
        f"run.max_steps={STEPS}", f"run.out={places / 'runs'}", "run.trackers=[]", "run.eval_every=0",
        f"run.eval_data={data}", "run.eval_prompts=1", "run.eval_max_new_tokens=4", "run.save_every=0",
        f"optim.lr={rate}", "optim.warmup=2",
        "policy.rollouts=4", "policy.rollout_batch=2", "policy.steps=4", "policy.optim.micro_batch=16",
        "policy.controller.n_mass=1",
    ]  # fmt: skip
    if recipe.head.kind == "eagle3":
        said += ["head.taps=[0,1,2]", f"head.draft_vocab_size={64 if recipe.head.config.draft_vocab_size else 0}"]
    return said


@pytest.mark.parametrize("name", RECIPES)
def test_a_copy_trains_and_decodes_losslessly(name: str, places: Path, train_here: Callable[..., None]):
    recipe = load(path_of(name))
    # EAGLE-3 reads three different states below the last layer's.
    layers = 3 if recipe.head.kind == "eagle3" else 2
    target = places / f"{recipe.target.name.replace('/', '_')}_{layers}"
    if not target.exists():
        copies.save(recipe.target.name, target, layers)
    width = copies.build(recipe.target.name, layers).shape.hidden_size
    train_here(path_of(name), *changes(recipe, target, width, places))
    folder = places / "runs" / name
    curve = losses(folder)
    assert list(curve) == list(range(1, STEPS + 1))
    assert all(map(math.isfinite, curve.values()))
    # Three steps are two rounds through the data, or four through MSD's texts, which fill the first half.
    end = STEPS // 2 - 1 if recipe.data.text_first else STEPS - 2
    assert curve[end - 2] + curve[end - 1] + curve[end] < curve[1] + curve[2] + curve[3], curve
    made, model = checkpoint.load(folder), load_target(str(target), "float64")
    made.check_target(model)
    wanted = []
    for i in range(3):
        content = [{"type": "image"}] * (i != 1) + [{"type": "text", "text": copies.words(i, 3 + i)}]
        asked = model.encode([{"role": "user", "content": content}], [copies.picture(i)] * (i != 1))
        wanted.append(Request(f"r{i}", asked, 9 - i, key=i))
    plain = [o.tokens for o in generate(model, wanted, NullDrafter(), SkipPolicy(), GreedySampler())]
    for policy in ("fixed", "viskip") if recipe.policy.kind == "learned" else ("fixed",):
        drafter, steering = drafter_and_policy(made, model, policy, rows := 2 if policy == "fixed" else 1)
        drafted = generate(model, wanted, drafter, steering, GreedySampler(), max_batch=rows)
        assert [o.tokens for o in drafted] == plain, policy
    assert model.dtype == torch.float64


def test_copies_are_of_the_public_targets_structure():
    """What a copy keeps is what heads and loop see of a target: heads and their width, positions, patches, ties."""
    for target in write_recipes.TARGETS.values():
        shape, copy = copies.SHAPES[target.name], copies.build(target.name)
        config = copy.model.config
        text, theirs = config.text_config, shape["text"]
        assert text.num_hidden_layers == 2
        ratio = theirs["num_attention_heads"] // theirs["num_key_value_heads"]
        assert text.num_attention_heads // text.num_key_value_heads == ratio
        assert copy.shape.head_dim == theirs.get("head_dim", theirs["hidden_size"] // theirs["num_attention_heads"])
        assert copy.shape.rope_theta == theirs["rope_theta"]
        assert text.rope_parameters.get("mrope_section") == theirs.get("mrope_section")
        assert config.vision_config.patch_size == shape["vision"]["patch_size"]
        tied = copy.model.get_input_embeddings().weight is copy.model.get_output_embeddings().weight
        assert tied == shape.get("tie_word_embeddings", False)


def test_files_are_what_the_writer_writes(capsys: pytest.CaptureFixture[str]):
    """35 files of one table: who changes the table or the planner writes them anew by scripts/write_recipes.py."""
    assert write_recipes.main(["--check"]) == 0, capsys.readouterr().out
