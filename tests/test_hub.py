"""Heads of the Hub: names and revisions, cache and offline use, other projects' layouts, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import mmspec
from mmspec import chat
from mmspec.checkpoint import DraftTree, load
from mmspec.convert import convert
from mmspec.hub import Place, fetch, listed, place_of, run_folder
from mmspec.targets import load_target
from mmspec.types import InputError
from scripts import convert as convert_script
from tests import test_convert as layouts
from tests import tiny
from tests.hub_server import Hub, hub  # noqa: F401 (hub is a fixture)
from tests.training import save_target

REPO = "acme/head"


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of a published head of the embedded target."""
    folder = tiny.run_folder(tmp_path_factory.mktemp("run"), load_target("tiny_llava"), DraftTree(2, 2, 3))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the random target that `layouts` are made for."""
    return str(save_target(tmp_path_factory.mktemp("target")))


def changed(files: dict[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    return {**files, name: json.dumps(json.loads(files[name]) | values).encode()}


# ---- names ----


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hub:org/name", Place("org/name")),
        ("hub:org/name@v1.0", Place("org/name", "v1.0")),
        ("org/na-me_1.5@refs/pr/1", Place("org/na-me_1.5", "refs/pr/1")),
        ("runs", None),
        ("tests/nothing", None),  # a mistyped path: the folder `tests` is there
        ("/org/name", None),
        ("./org/name", None),
        ("org/name/more", None),
        ("../name", None),
    ],
)
def test_what_is_a_place_on_the_hub(text, place, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert place_of(text) == place
    assert place_of(Path(text)) == (place_of(str(Path(text))))


@pytest.mark.parametrize("text", ["hub:", "hub:name", "hub:../name", "hub:org/..", "hub:org/name@", "hub:a/b@../c"])
def test_a_wrong_place_is_said(text):
    with pytest.raises(InputError, match="must be hub:org/name or hub:org/name@revision"):
        place_of(text)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("head.json", True),
        ("costs/cpu-2t.json", True),
        ("eval/summary.json", True),
        ("costs/../head.json", False),
        ("../head.json", False),
        ("/head.json", False),
        ("costs/a/b.json", False),
        ("costs\\..\\x.json", False),
        ("./head.json", False),
        ("head.json/", False),
        ("model.bin", False),
    ],
)
def test_what_is_on_the_list(name, good):
    assert listed(name) is good


# ---- fetching ----


def test_revisions_are_pinned_and_kept_apart(hub, head):  # noqa: F811
    first = hub.put(REPO, head)
    hub.put(REPO, changed(head, "tree.json", depth=1), "v2")
    second = hub.put(REPO, changed(head, "tree.json", budget=2))
    found = {revision: load(f"hub:{REPO}@{revision}") for revision in (first, second, "v2")}
    assert [one.tree for one in found.values()] == [DraftTree(2, 2, 3), DraftTree(2, 2, 2), DraftTree(1, 2, 3)]
    assert load(REPO).tree == DraftTree(2, 2, 2)
    assert [found[sha].folder.name for sha in (first, second)] == [first, second]
    with pytest.raises(InputError, match=r"hub:acme/head@v3 cannot be loaded: it has no such revision"):
        load(f"{REPO}@v3")


@pytest.mark.parametrize("how", ["offline", "down"])
def test_what_was_fetched_stays_usable_without_the_hub(hub, head, monkeypatch, how):  # noqa: F811
    hub.put(REPO, head)
    folder = load(REPO).folder
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.faults.add("down")
    asked = len(hub.seen)
    assert load(REPO).folder == folder
    assert how == "down" or len(hub.seen) == asked
    with pytest.raises(InputError, match=r"hub:acme/other cannot be loaded: .* not in the cache") as raised:
        load("acme/other")
    assert "\n" not in str(raised.value)


def test_a_head_without_all_of_its_files_is_not_kept(hub, head):  # noqa: F811
    hub.put(REPO, {name: file for name, file in head.items() if name != "tree.json"})
    with pytest.raises(InputError, match=r"hub:acme/head is incomplete: it has no tree\.json"):
        load(f"hub:{REPO}")


def test_only_listed_files_are_fetched(hub, head):  # noqa: F811
    more = {
        "model.bin": b"pickle",
        "custom.py": b"code",
        "README.md": b"# x",
        "costs/c.json": b"{}",
        "notes.json": b"{}",
    }
    hub.put(REPO, {**head, **more})
    folder = load(REPO).folder
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {*head, "costs/c.json"}
    fetched = {line.split("/")[-1] for line in hub.seen if "/resolve/" in line}
    assert fetched == {*head, "c.json"}


def test_what_a_head_measures_here_stays_out_of_the_hubs_own_cache(hub, head):  # noqa: F811
    hub.put(REPO, head)
    mmspec.Speculator.from_pretrained(REPO)  # the controller's costs are measured and kept
    assert list((load(REPO).folder / "costs").glob("*.json"))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("costs"))


def test_commands_take_a_place_and_an_error_is_one_line(hub, head, capsys):  # noqa: F811
    hub.put(REPO, head)
    words = ["--prompt", "Hello", "--max-new-tokens", "4", "--dtype", "float64", "--policy", "fixed"]
    assert chat.main(["--ckpt", f"hub:{REPO}", *words, "--compare"]) == 0
    assert "the same tokens" in capsys.readouterr().out
    assert chat.main(["--ckpt", "hub:acme/missing", *words]) == 2
    error = capsys.readouterr().err
    assert "hub:acme/missing cannot be loaded: the Hub has no such repository, or it is private" in error
    assert error.count("\n") == 1


def test_a_private_head_needs_the_token(hub, head, monkeypatch):  # noqa: F811
    hub.put(REPO, head, private=True)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(InputError, match="no token"):
        load(REPO)
    monkeypatch.undo()


# ---- what is refused ----


def refusals() -> dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]]:
    header = struct.pack("<Q", 1 << 40)
    code = {"auto_map": {"AutoModel": "x.Y"}}
    return {
        "pickle": (lambda f: {"config.json": b"{}", "pytorch_model.bin": b"x"}, "a pickle, and no safetensors"),
        "nothing": (lambda f: {"README.md": b"x"}, "it is no draft head"),
        "whole model": (
            lambda f: {"model.safetensors.index.json": b"{}", "model-1.safetensors": b"x"},
            "a whole model in several files",
        ),
        "name": (lambda f: {**f, "costs/../../../../x.json": b"{}"}, "does not stay inside its folder"),
        "header": (
            lambda f: {**f, "head.safetensors": header + b"{}" * 8},
            "head.safetensors is damaged (its header is longer than the file)",
        ),
        "large header": (
            lambda f: {**f, "head.safetensors": struct.pack("<Q", 11 << 20) + b" " * (11 << 20)},
            "has a header of 11534336 bytes, more than",
        ),
        "pickle by content": (
            lambda f: {**f, "head.safetensors": b"PK\x03\x04" + b"x" * 40},
            "is a pickle by its content",
        ),
        "short": (lambda f: {**f, "viskip.safetensors": b"abc"}, "viskip.safetensors is damaged"),
        "truncated": (lambda f: {**f, "head.safetensors": f["head.safetensors"][:-8]}, "head.safetensors is damaged"),
        "code": (lambda f: changed(f, "head.json", **code), "asks for remote code (auto_map)"),
        "deep code": (lambda f: changed(f, "tree.json", a=[{"trust_remote_code": True}]), "(trust_remote_code)"),
        "foreign code": (
            lambda f: {"config.json": json.dumps(code).encode(), "model.safetensors": f["head.safetensors"]},
            "asks for remote code (auto_map)",
        ),
        "no json": (lambda f: {**f, "head.json": b"\x80\x02K\x01."}, "head.json is damaged"),
        "path": (
            lambda f: changed(f, "head.json", target={"name": "/etc/model"}),
            "its target '/etc/model' is neither",
        ),
        "no target": (lambda f: changed(f, "head.json", target=3), "its target None is neither"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_must_not_be_read_is_refused_in_one_line(hub, head, case):  # noqa: F811
    change, said = refusals()[case]
    hub.put(REPO, change(head))
    with pytest.raises(InputError) as raised:
        load(REPO)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_store_that_repositories_share_is_followed(hub, head):  # noqa: F811
    """Newer versions of the Hub's library keep one copy of what several repositories hold, beside them in the cache."""
    hub.put(REPO, head)
    snapshot = fetch(Place(REPO))
    blob = (snapshot / "head.safetensors").resolve()
    shared = Path(constants.HF_HUB_CACHE) / "blobs" / "ab" / blob.name
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert (run_folder(REPO) / "head.safetensors").read_bytes() == head["head.safetensors"]


def test_a_link_that_leads_out_of_the_cache_is_refused(hub, head, tmp_path):  # noqa: F811
    hub.put(REPO, head)
    snapshot = fetch(Place(REPO))
    assert (snapshot / "tree.json").is_symlink()  # the Hub's own links stay inside
    outside = tmp_path / "outside.json"
    outside.write_bytes(head["tree.json"])
    (snapshot / "tree.json").unlink()
    (snapshot / "tree.json").symlink_to(outside)
    with pytest.raises(InputError, match=r"tree\.json is a symlink"):
        run_folder(REPO)


# ---- other projects' layouts ----


def foreign(tmp_path: Path, layout: str) -> dict[str, bytes]:
    torch.manual_seed(0)
    tensors = {
        "eagle": layouts.eagle,
        "eagle3": lambda: layouts.eagle3("midlayer."),
        "msd": lambda: layouts.eagle(input_layernorm=""),
        "vispec": layouts.vispec,
        "medusa": lambda: layouts.medusa(2, 1, False),
    }[layout]()
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    if "embed_tokens.weight" in tensors:
        tensors["embed_tokens.weight"] = tiny.llava(dtype="float32").embed(torch.arange(tiny.VOCAB)).clone()
    config = layouts.CONFIG | ({"draft_vocab_size": len(layouts.IDS)} if layout == "eagle3" else {})
    folder = layouts.publish(tmp_path / layout, tensors, config)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", ["eagle", "eagle3", "msd", "vispec", "medusa"])
def test_a_public_layout_is_translated_once_and_drafts(hub, tmp_path, target, layout):  # noqa: F811
    files = foreign(tmp_path, layout)
    sha = hub.put(REPO, {**files, "README.md": b"x", "training_args.bin": b"x"})
    model = mmspec.Speculator.from_pretrained(f"hub:{REPO}", target, policy="fixed")
    made = load(REPO, target)
    assert made.kind == layout
    direct = convert(tmp_path / layout, "auto", model.target, tmp_path / "direct")
    mine, theirs = made.head().state_dict(), direct.head().state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    origin = json.loads((made.folder / "provenance.json").read_text())["converted"]
    assert (origin["from"], origin["layout"]) == (f"hub:{REPO}@{sha}", layout)
    plain = mmspec.Speculator.from_pretrained(REPO, target, policy="plain")
    answers = [one.generate("w1 w2 w3", max_new_tokens=8)[0].output.tokens for one in (model, plain)]
    assert answers[0] == answers[1]
    stamp = (made.folder / "head.safetensors").stat().st_mtime_ns
    assert (load(REPO, target).folder / "head.safetensors").stat().st_mtime_ns == stamp


def test_a_public_head_needs_its_target(hub, tmp_path, target, capsys):  # noqa: F811
    files = foreign(tmp_path, "eagle")
    hub.put(REPO, files)
    with pytest.raises(InputError, match=r"does not say its target; name it \(--target org/name\)"):
        load(REPO)
    with pytest.raises(InputError, match=r"hidden_size 32, but the target tiny_llava has 192"):
        load(REPO, "tiny_llava")
    verifier = {"speculators_config": {"verifier": {"name_or_path": "acme/target"}}}
    hub.put(REPO, changed(files, "config.json", **verifier))
    with pytest.raises(InputError, match="target 'acme/target' cannot be loaded"):
        load(REPO)
    out = str(tmp_path / "out")
    assert convert_script.main([f"hub:{REPO}", "--layout", "msd", "--target", target, "--out", out]) == 0
    assert load(out).kind == "msd"
    origin = json.loads((Path(out) / "provenance.json").read_text())["converted"]["from"]
    assert origin == f"hub:{REPO}@{fetch(Place(REPO)).name}"
