"""Files of others: what could run code, leave its folder or fill the memory is refused in one line, the rest is read"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmspec import safety
from mmspec.targets import describe_target, load_target, load_vocabulary
from mmspec.types import InputError


def weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.arange(3)}, str(path))
    return path


def refused(said: str, check: Any, *what: Any) -> None:
    with pytest.raises(InputError) as error:
        check(*what)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "..",
        "../head.json",
        "a/../../b",
        "a//b",
        "./a",
        "a/",
        "a\\b",
        "..\\b",
        "C:/a",
        "a\nb",
        "a\0b",
    ],
)
def test_names_that_leave_their_folder(name: str):
    refused(repr(name), safety.check_name, name)


@pytest.mark.parametrize("name", ["head.json", "costs/cpu.json", "..a", "a..b/c", ".gitattributes", "größe.json"])
def test_names_that_stay(name: str):
    assert safety.check_name(name) == name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "head.pt", "HEAD.PTH", "x.ckpt", "x.pkl", "model.safetensors"])
def test_pickles_by_name_and_by_content(tmp_path: Path, name: str):
    """One that is called safetensors is one all the same, in both formats that torch has written."""
    for new in (True, False):
        torch.save({"w": torch.ones(2)}, tmp_path / name, _use_new_zipfile_serialization=new)
        refused("a pickle", safety.check_file, tmp_path / name)


def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path):
    """Its two lowest bytes are then a pickle's mark."""
    path = tmp_path / "m.safetensors"
    for mark in (0x0280, 0x0480):
        header = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(mark)
        path.write_bytes(mark.to_bytes(8, "little") + header + b"a")
        assert safety.check_header(safety.check_file(path)) == mark
        assert load_file(str(path))["w"].tolist() == [97]


def test_headers(tmp_path: Path):
    path = weights(tmp_path / "m.safetensors")
    whole = path.read_bytes()
    assert safety.check_header(path) == int.from_bytes(whole[:8], "little")
    for damaged, said in (
        (b"", "longer than the file"),
        (whole[:20], "longer than the file"),
        ((2**63).to_bytes(8, "little") + whole[8:], "longer than the file"),
        (b"[" * 8 + b"[" * 8, "longer than the file"),
        ((9).to_bytes(8, "little") + b"[1,2,3,4]", "no JSON object"),
        ((100000).to_bytes(8, "little") + b"[" * 100000, "no JSON object"),
    ):
        path.write_bytes(damaged)
        refused(said, safety.check_file, path)
    # A header of the size that is refused, in a sparse file: it is not read before it is refused.
    with path.open("wb") as file:
        file.write((safety.MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(safety.MAX_HEADER + 100)
    refused(f"header of {safety.MAX_HEADER + 1} bytes", safety.check_file, path)


def test_links_are_not_followed(tmp_path: Path):
    outside = weights(tmp_path / "outside.safetensors")
    folder = tmp_path / "in"
    folder.mkdir()
    for there in (outside, tmp_path / "none", tmp_path):
        link = folder / "head.safetensors"
        link.symlink_to(there)
        refused("symlink", safety.check_file, link)
        link.unlink()
    os.mkfifo(tmp_path / "pipe")
    refused("no regular file", safety.check_file, tmp_path / "pipe")
    refused("does not exist", safety.check_file, tmp_path / "none")


def test_the_hub_cache_links_into_its_own_store_and_nowhere_else(tmp_path: Path):
    """The Hub's client lays a snapshot out as links to blobs of the same repository."""
    repository = tmp_path / "models--org--name"
    blob = weights(repository / "blobs" / "abc.safetensors").rename(repository / "blobs" / "abc")
    snapshot = repository / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (snapshot / "head.safetensors").symlink_to(Path("../../blobs/abc"))
    assert safety.check_file(snapshot / "head.safetensors") == snapshot / "head.safetensors"
    for there in (weights(tmp_path / "other.safetensors"), snapshot, repository / "blobs" / "none"):
        (snapshot / "more").symlink_to(there)
        said = "symlink" if there.parent != blob.parent else "no regular file"
        refused(said, safety.check_file, snapshot / "more")
        (snapshot / "more").unlink()


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"text_config": {"trust_remote_code": True}},
        {"x": [{"y": [{"custom_pipelines": {"p": {"impl": "evil.P"}}}]}]},
    ],
)
def test_a_config_that_asks_for_remote_code(tmp_path: Path, settings: dict[str, Any]):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    refused("asks for remote code", safety.read_settings, path)
    path.write_text(json.dumps({"trust_remote_code": False, "hidden_size": 8}))
    assert safety.read_settings(path)["hidden_size"] == 8


def test_settings_that_are_none(tmp_path: Path):
    path = tmp_path / "config.json"
    for text, said in (
        ("[1]", "not a JSON object"),
        ("{", "is damaged"),
        ("[" * 100000, "is damaged"),
        ('{"a": "' + "a" * safety.MAX_JSON + '"}', "more than"),
    ):
        path.write_text(text)
        refused(said, safety.read_settings, path)
    path.write_bytes(b"\xff\xfe")
    refused("is damaged", safety.read_settings, path)


@pytest.mark.parametrize("read", [load_target, describe_target, load_vocabulary])
@pytest.mark.parametrize(
    "config", [{"model_type": "made_up", "auto_map": {"AutoConfig": "mine.Config"}}, {"model_type": "made_up"}, {}]
)
def test_a_target_that_nobody_knows_is_refused_and_its_code_not_run(
    read: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused(f"target '{tmp_path}' cannot be loaded: ", read, str(tmp_path))
    assert not (tmp_path / "ran").exists()
