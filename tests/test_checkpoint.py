"""Run folders: what is saved comes back equal, what is damaged or for another target is refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmspec import checkpoint
from mmspec.heads import eagle, viskip
from mmspec.recipe import load
from mmspec.types import InputError
from tests import tiny
from tests.training import save_recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tiny.llava(dtype="float32")
    config = eagle.Config().resolve(target.shape)
    torch.manual_seed(3)
    head = eagle.Head(config)
    control = viskip.Config(width=8, depth=3).resolve(target.shape)
    run = tmp_path / "run"
    checkpoint.save_head(run, head.state_dict(), config, target)
    checkpoint.save_controller(run, viskip.Head(control).state_dict(), control, target)
    checkpoint.save_tree(run, checkpoint.DraftTree(5, 4, 20))
    return run


def test_what_was_saved_comes_back(folder: Path):
    target = tiny.llava(dtype="float32")
    torch.manual_seed(3)
    head = eagle.Head(eagle.Config().resolve(target.shape))
    loaded = checkpoint.load(folder)
    loaded.check_target(target)
    assert (loaded.kind, loaded.config, loaded.tree) == ("eagle", head.config, checkpoint.DraftTree(5, 4, 20))
    again = loaded.head()
    assert not again.training
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    controller = loaded.controller()
    assert controller is not None
    assert not controller.training
    assert loaded.head(torch.bfloat16).fc.weight.dtype == torch.bfloat16


def test_a_head_without_controller_is_a_checkpoint(folder: Path):
    (folder / "viskip.json").unlink()
    with pytest.raises(InputError, match="only one of"):
        checkpoint.load(folder)
    (folder / "viskip.safetensors").unlink()
    assert checkpoint.load(folder).controller() is None


def test_nothing_but_named_files_is_left_and_nothing_is_pickled(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert names == {"head.safetensors", "head.json", "viskip.safetensors", "viskip.json", "tree.json"}


def test_missing_empty_and_incomplete_folders(tmp_path: Path, folder: Path):
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        checkpoint.load(tmp_path / "empty")
    for name in ("tree.json", "head.safetensors", "head.json"):
        (folder / name).unlink()
        with pytest.raises(InputError, match=f"has no {name}"):
            checkpoint.load(folder)


def test_a_folder_named_as_a_file(folder: Path):
    with pytest.raises(InputError):
        checkpoint.load(folder / "head.json")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_off_weights_are_refused(folder: Path, keep: int):
    path = folder / "head.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(InputError, match="damaged") as error:
        checkpoint.load(folder)
    assert "\n" not in str(error.value)


def test_garbage_in_json_is_refused(folder: Path):
    for text in ("{", "[]", "{}", '{"kind": "eagle", "config": {"no_such_key": 1}}'):
        (folder / "head.json").write_text(text)
        with pytest.raises(InputError) as error:
            checkpoint.load(folder)
        assert "head.json" in str(error.value)


def test_weights_that_do_not_fit_their_config(folder: Path):
    path = folder / "head.safetensors"
    state = load_file(path)
    name = next(iter(state))
    save_file({**state, "stray": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="stray"):
        checkpoint.load(folder).head()
    save_file({**state, name: torch.zeros(2, 3)}, path)
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        checkpoint.load(folder).head()


def test_another_target_is_refused_with_both_values(folder: Path):
    ours, loaded = tiny.llava(dtype="float32"), checkpoint.load(folder)
    other = tiny.llava(dtype="float32", seed=1)
    with pytest.raises(InputError, match="fingerprint") as error:
        loaded.check_target(other)
    assert ours.fingerprint in str(error.value)
    assert other.fingerprint in str(error.value)
    for field, words in (("hidden_size", "hidden size"), ("vocab_size", "vocabulary size")):
        wrong = dataclasses.replace(loaded.target.shape, **{field: 999})
        changed = dataclasses.replace(loaded, target=dataclasses.replace(loaded.target, shape=wrong))
        with pytest.raises(InputError, match=f"{words} 999") as error:
            changed.check_target(ours)
        assert str(getattr(ours.shape, field)) in str(error.value)


def test_provenance_says_how_and_not_where(tmp_path: Path):
    recipe = load(save_recipe(tmp_path / "r.yaml", "tiny_llava", "synth:train", tmp_path))
    argv = ["/home/somebody/train/distill.py", "recipes/a.yaml", "data.train=/home/somebody/secret/data.json"]
    checkpoint.save_provenance(tmp_path, recipe, tiny.llava(dtype="float32"), "abc", argv)
    text = (tmp_path / "provenance.json").read_text()
    said = json.loads(text)
    assert "somebody" not in text
    assert said["command"][1:] == ["recipes/a.yaml", "data.train=.../data.json"]
    assert said["data_hash"] == "abc"
    assert said["libraries"]["torch"] == torch.__version__


def test_equal_weights_are_equal_files(tmp_path: Path) -> None:
    """Files are compared and keyed by their bytes; the library's own order of metadata is another one in every call."""
    tensors = {"b.weight": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16), "c": torch.zeros(0)}
    about = {"format": "pt", "schema": "1", "z": "größe", "y": "2"}
    path = tmp_path / "head.safetensors"
    found = set()
    for _ in range(8):
        checkpoint.write_tensors(path, tensors, about)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(str(path), framework="pt") as file:
        assert file.metadata() == about
    back = load_file(str(path))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items())
