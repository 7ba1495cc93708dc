"""Recipes: what is wrong with one is a single line that says what to do; what is right comes out as plain objects."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from mmspec.heads import eagle, viskip
from mmspec.losses import LossConfig
from mmspec.recipe import Recipe, head_kinds, load
from mmspec.types import InputError
from tests.training import save_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save_recipe(tmp_path / "r.yaml", "tiny_llava", "synth:train", tmp_path / "runs")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_loads(recipe: Path):
    loaded = load(recipe)
    assert loaded.run.name == recipe.stem
    assert "train/distill.py" in recipe.read_text().split("\ntarget:")[0]
    assert (loaded.data.decontaminated is not None) == (loaded.target.name != "tiny_llava"), "real targets need a list"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_the_commands_of_a_header_train_on_as_many_records_as_the_recipe(recipe: Path):
    """Hours and epochs are of these: the mix that a command names takes the place of the recipe's data, limits too."""
    header = recipe.read_text().split("\ntarget:")[0]
    for data in re.findall(r"data\.\w+=[^\"\n]*mix\.json[^\"\n]*", header):
        limits = [[source.limit for source in load(recipe, words).data.sources] for words in ([], [data])]
        assert limits[0] == limits[1], data
    assert ('"$DATA"' in header) == ("DATA=" in header)


def test_load_returns_plain_objects_with_overrides(path: Path):
    recipe = load(path, ["optim.lr=0.5", "optim.betas=[0.8,0.9]", "run.resume=true", "data.train=x.json"])
    assert recipe.optim.lr == 0.5
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.run.resume is True
    assert [source.path for source in recipe.data.sources] == ["x.json"]
    assert isinstance(recipe.head.config, eagle.Config)
    assert isinstance(recipe.policy.controller, viskip.Config)
    assert isinstance(recipe.loss, LossConfig)
    plain = (dict, list, tuple, str, int, float, bool, type(None))

    def walk(value: object) -> None:
        assert dataclasses.is_dataclass(value) or type(value) in plain, type(value)
        if dataclasses.is_dataclass(value):
            for item in dataclasses.fields(value):
                walk(getattr(value, item.name))
        elif isinstance(value, list | tuple):
            for entry in value:
                walk(entry)

    walk(recipe)


def test_saved_recipe_is_the_same_recipe(path: Path, tmp_path: Path):
    recipe = load(path, ["head.input_norm=true", "data.max_length=99"])
    recipe.save(tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml") == recipe


def test_yaml_round_trip_keeps_layout(path: Path):
    nodes = ["target", "head", "data", "loss", "optim", "policy", "run", "deepspeed"]
    assert [item.name for item in dataclasses.fields(Recipe)] == nodes
    assert list(load(path).as_dict()) == nodes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lrr=1", ["optim.lrr", "'lr'"]),
        ("optin.lr=1", ["optin", "'optim'"]),
        ("head.input_nrm=true", ["head.input_nrm", "'input_norm'"]),
        ("policy.controller.wdth=3", ["policy.controller.wdth", "'width'"]),
        ("data.trian=x", ["data.trian", "'train'"]),
        ("head.kind=eagel", ["head.kind", "'eagel'", "eagle"]),
        ("head.kind=viskip", ["head.kind", "eagle"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("optim.micro_batch=0", ["optim.micro_batch=0", "at least 1"]),
        ("optim.micro_batch=1.5", ["optim.micro_batch"]),
        ("optim.lr=-1", ["optim.lr", "greater than 0"]),
        ("optim.betas=[0.9,1.0]", ["optim.betas=[0.9, 1.0]", "less than 1"]),
        ("optim.betas=[0.9]", ["optim"]),  # OmegaConf 2.4 refuses it by itself
        ("policy.optim.betas=[-0.1,0.9]", ["policy.optim.betas=[-0.1, 0.9]", "at least 0"]),
        ("policy.optim.weight_decay=-1", ["policy.optim.weight_decay=-1", "at least 0"]),
        ("optim.schedule=cosin", ["optim.schedule", "'cosine'"]),
        ("loss.steps=0", ["loss", "at least 1"]),
        ("run.max_steps=-1", ["run.max_steps", "-1", "at least 0"]),
        ("run.max_steps=0", ["run.max_steps=0", "policy.kind=learned"]),
        ("run.name=../x", ["run.name", "run.out"]),
        ("deepspeed.zero_stage=4", ["deepspeed.zero_stage=4"]),
        ("deepspeed.offload_param=true", ["deepspeed.zero_stage=3"]),
        ("deepspeed.config=none.json", ["none.json"]),
        ("data.sources=[]", ["data.sources", "data.train"]),
        ("data.sources=[{pth: x}]", ["data.sources[0].pth", "'path'"]),
        ("head={kind: vispec, n_queries: 0}", ["head.n_queries", "at least 1"]),
        ("head={kind: msd, image_input: none}", ["head.image_input='none'", "embeds"]),
        ("data.text_first=1", ["data.text_first=1", "less than 1"]),
        ("loss.unroll=none", ["loss.unroll=none", "loss.steps=1"]),
        ("head.lora.rank=-1", ["head.lora.rank=-1", "at least 0"]),
        ("head.lora.rank=4", ["head.lora.rank=4", "head.init_from"]),
        ("head.lora.rnak=4", ["head.lora.rnak", "'rank'"]),
        ("head.lora.dropout=1", ["head.lora.dropout=1"]),
        ("head.lora.alpha=0", ["head.lora.alpha=0", "greater than 0"]),
        ("head.lora.modules=[]", ["head.lora.modules", "q_proj"]),
        ("head.init_layer=first", ["head.init_layer"]),
        ("head.blind=maybe", ["head.blind"]),
        ("loss.dependence=-1", ["loss.dependence", "at least 0"]),
        ("head=3", ["head must be a mapping"]),
        ("optim=3", ["optim must be a mapping"]),
        ("resume", ["'resume'", "key=value"]),
    ],
)
def test_wrong_input_is_one_line_that_names_it(path: Path, override: str, said: list[str]):
    with pytest.raises(InputError) as error:
        load(path, [override])
    message = str(error.value)
    assert "\n" not in message
    for words in said:
        assert words in message


def test_stored_states_have_no_positions_of_the_target(path: Path):
    assert load(path, ["head.rope=mrope"]).head.config.rope == "mrope"
    with pytest.raises(InputError, match=r"data\.features=f does not hold; use head\.rope=1d"):
        load(path, ["head.rope=mrope", "data.features=f"])


def test_a_missing_value_is_named(path: Path):
    raw = yaml.safe_load(path.read_text())
    del raw["run"]["seed"]
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(InputError, match=r"run\.seed is missing"):
        load(path)


def test_a_missing_recipe_and_one_that_is_no_recipe(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "none.yaml")
    for text in ("[1, 2]", "a: [", "3", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            load(tmp_path / "bad.yaml")
        assert "\n" not in str(error.value)


def test_head_kinds_are_the_files():
    assert {"eagle", "eagle3"} <= set(head_kinds())
    assert not {"base", "viskip", "_drafter", "_unrolled"} & set(head_kinds())
