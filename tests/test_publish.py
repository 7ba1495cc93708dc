"""Publishing: what goes, what must not, what the card says, and a Hub that refuses, breaks or holds something else."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import save_file

import mmspec
from eval import card, publish
from eval import mmspec as evaluation
from mmspec import chat
from mmspec.checkpoint import DraftTree, load, save_provenance
from mmspec.recipe import load as load_recipe
from mmspec.synth import sample
from mmspec.targets import load_target
from mmspec.types import InputError
from scripts import publish as script
from tests import tiny
from tests.hub_server import GOOD, WRONG, Hub, hub, settings  # noqa: F401 (hub is a fixture)

ROOT = Path(__file__).parent.parent
REPO = "acme/viskip-tiny"
QUESTION = "How many shapes are there?"
FILES = {
    "README.md", "eval/report.html", "eval/summary.json", "head.json", "head.safetensors",
    "plots/latency.svg", "provenance.json", "recipe.yaml", "tree.json", "viskip.json", "viskip.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that training and evaluation leave behind, paths of this machine included."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    target = load_target("tiny_llava")
    tiny.run_folder(folder, target, DraftTree(2, 2, 3))
    recipe = load_recipe(ROOT / "recipes" / "viskip_tiny.yaml", [f"run.out={folder.parent}"])
    recipe.save(folder / "recipe.yaml")
    save_provenance(folder, recipe, target, "abc", ["train/distill.py", f"run.out={folder.parent}"])
    words = ["--data", "synth:testmini", "--limit", "2", "--max-new-tokens", "6", "--dtype", "float64"]
    assert evaluation.main(["--ckpt", str(folder), *words]) == 0
    for name in ("metrics.jsonl", "state.json", "quarantine.jsonl", "sam.safetensors"):
        (folder / name).write_text("{}\n")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "debug.log").symlink_to("/dev/null")
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def publish_now(run: Path, *words: str) -> int:
    return script.main([str(run), REPO, *words])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- what goes ----


def test_a_dry_run_writes_exactly_the_listed_files_and_sends_nothing(run, tmp_path, hub, capsys):  # noqa: F811
    assert publish_now(run, "--dry-run", str(tmp_path / "out")) == 0
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    costs = {name for name in there if name.startswith("costs/")}
    assert there - costs == FILES
    assert costs
    assert hub.seen == []
    assert "nothing was sent" in capsys.readouterr().out
    assert publish_now(run, "--dry-run") == 0  # its usual place, and once more over itself
    assert publish_now(run, "--dry-run") == 0


def test_no_published_file_holds_a_token_a_path_or_the_machines_name(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    names = publish.build(run, tmp_path / "out", publish.Options(REPO))
    whole = "\n".join((tmp_path / "out" / name).read_bytes().decode("latin-1") for name in names)
    for secret in (str(tmp_path), str(run.parent), str(ROOT), str(Path.home()) + "/", "correct-horse-battery"):
        assert secret not in whole, secret
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", "".join(map(str, text_of(tmp_path / "out", names))))
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["run"]["out"].startswith(".../")


def text_of(folder: Path, names: list[str]) -> list[str]:
    return [(folder / name).read_text() for name in names if not name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"token {GOOD}", "a token"),
        ("wandb ghp_abcdefghijklmnopqrstuvwx", "a token"),
        ("https://me:secret@example.org/x", "a token"),
        ("correct-horse-battery", "a token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a token"),
        ("data in /home/someone/data.json", "a path"),
        ("out=/scratch/runs/1", "a path"),
        (r"C:\\Users\\someone\\data", "a path"),
        ("file:///somewhere/else", "a path"),
        ("served by 192.168.1.17", "an address"),
        ("node7.cluster.internal", "an address"),
    ],
)
def test_the_scan_finds(tmp_path, monkeypatch, text, what):
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    (tmp_path / "README.md").write_text(f"# A head\n\n{text}\n")
    with pytest.raises(InputError, match=rf"README.md, line 3, holds {what}") as raised:
        publish.check(tmp_path)
    assert GOOD not in str(raised.value)


def test_of_a_found_secret_only_its_name_and_place_are_told(tmp_path, monkeypatch):
    """Messages end up in logs: six letters of a short password are most of it."""
    monkeypatch.setenv("SOME_PASSWORD", "xyzzyplugh")
    (tmp_path / "README.md").write_text("one\nxyzzyplugh and wandb ghp_abcdefghijklmnopqrstuvwx\n")
    with pytest.raises(InputError, match="2 findings in all") as raised:
        publish.check(tmp_path)
    assert "'one of GitHub in README.md:2'" in str(raised.value)
    with pytest.raises(InputError, match=r"holds a token, 'the value of SOME_PASSWORD in README.md:2'") as again:
        publish.check(tmp_path, ["one of GitHub in README.md:2"])
    for message in (str(raised.value), str(again.value)):
        assert "xyz" not in message
        assert "ghp" not in message
        assert "\n" not in message
    told = ["one of GitHub in README.md:2", "the value of SOME_PASSWORD in README.md:2"]
    assert publish.check(tmp_path, told) == ["README.md"]


def test_the_scan_reads_headers_of_weights_and_lets_harmless_text_pass(tmp_path):
    fine = "</data> https://huggingface.co/home/x 1/2 a/tmp/b .../runs torch 2.13.0+cpu v1.10.3 e543e07a58f9801a\n"
    (tmp_path / "README.md").write_text(fine)
    tensors = {"w": load_target("tiny_llava").embed.__self__.embedding.weight[:1].clone()}
    save_file(tensors, str(tmp_path / "head.safetensors"))
    assert publish.check(tmp_path) == ["README.md", "head.safetensors"]
    save_file(tensors, str(tmp_path / "head.safetensors"), {"from": "/home/someone/run"})
    with pytest.raises(InputError, match=r"head.safetensors, line 1, holds a path"):
        publish.check(tmp_path)
    assert publish.check(tmp_path, ["/home/someone/run"]) == ["README.md", "head.safetensors"]


def test_links_other_names_and_weights_that_are_none_do_not_go(tmp_path):
    out = tmp_path / "out"
    (out / "costs").mkdir(parents=True)
    (out / "tree.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match=r"tree\.json is a link"):
        publish.check(out)
    (out / "tree.json").unlink()
    for name in ("model.bin", "head.py", "costs/model.bin", "eval/requests.jsonl"):
        path = out / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        with pytest.raises(InputError, match=f"{name} is not on the list"):
            publish.check(out)
        path.unlink()
    (out / "head.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(InputError, match=r"head\.safetensors is damaged"):
        publish.check(out)


# ---- what is refused ----


def test_a_run_without_proof_is_refused_and_anyway_the_card_says_so(run, tmp_path, capsys):
    scores = run / "eval" / "summary.json"
    whole = scores.read_text()

    def wrong(said: str) -> None:
        assert publish_now(run, "--dry-run", str(tmp_path / "no")) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
        assert not (tmp_path / "no").exists()
        out = tmp_path / "anyway"
        assert publish_now(run, "--dry-run", str(out), "--anyway") == 0
        text = (out / "README.md").read_text()
        assert f"**Warning:** published although {said}" in text
        assert "model-index" not in text
        shutil.rmtree(out)

    summary = json.loads(whole)
    summary["methods"]["viskip"]["overall"] |= {"exact_match": 0.5, "diverged": 1}
    scores.write_text(json.dumps(summary))
    wrong("viskip changed the text: exact_match 0.500, 1 without a tie")
    scores.write_text(json.dumps(json.loads(whole) | {"cells": [summary]}))  # of a sweep not only the first counts
    wrong("viskip changed the text: exact_match 0.500, 1 without a tie")
    summary["methods"]["viskip"]["overall"] |= {"exact_match": None, "diverged": None}
    scores.write_text(json.dumps(summary))
    wrong("the text of viskip was not compared with plain decoding's")
    scores.write_text(json.dumps(json.loads(whole) | {"valid": False}))
    wrong("its evaluation is marked invalid")
    scores.write_text(json.dumps(json.loads(whole) | {"settings": {"fingerprint": "other"}}))
    wrong("its evaluation is of another target")
    scores.unlink()
    wrong("it was never evaluated")
    scores.write_text(whole)
    (run / "provenance.json").unlink()
    wrong("it has no provenance.json")


def test_ties_pass_the_gate(run):
    scores = run / "eval" / "summary.json"
    summary = json.loads(scores.read_text())
    summary["methods"]["viskip"]["overall"] |= {"exact_match": 1.0, "ties": 2, "diverged": 0}
    assert publish.objections(load(run), summary) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base-model", "not a name"], "--base-model not a name must be org/name"),
        (["--revison", "x"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_one_line(run, capsys, words, said):
    assert publish_now(run, *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("publish: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert script.main([str(run), "nameonly"]) == 2
    assert "must be ORG/NAME" in capsys.readouterr().err


def test_a_target_in_a_folder_needs_its_name_on_the_hub(run, tmp_path):
    for name in ("head.json", "viskip.json"):
        record = json.loads((run / name).read_text())
        record["target"]["name"] = ".../my_llava"
        (run / name).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"my_llava is a folder of this machine; say what it is on the Hub"):
        publish.build(run, tmp_path / "a", publish.Options(REPO))
    publish.build(run, tmp_path / "b", publish.Options(REPO, base_model="llava-hf/llava-1.5-7b-hf"))
    assert load(tmp_path / "b").target.name == "llava-hf/llava-1.5-7b-hf"
    head = yaml.safe_load((tmp_path / "b" / "README.md").read_text().split("---\n")[1])
    assert head["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert (head["license"], head["license_name"]) == ("other", "as-base-model")


# ---- the card ----


def test_the_card_renders_and_its_tables_and_links_hold(run, tmp_path):
    names = publish.build(run, tmp_path / "out", publish.Options(REPO))
    text = (tmp_path / "out" / "README.md").read_text()
    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    assert html.count("<table>") == 3
    assert "| " not in re.sub(r"<(pre|code)>.*?</\1>", "", html, flags=re.DOTALL)  # no row fell out of its table
    assert "](" not in html
    cells = [len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL)]
    assert set(cells) == {2, 6}
    for link in re.findall(r'(?:href|src)="([^"]+)"', html):
        assert link.startswith("https://") or link in names, link
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for said in ("## Scores", "overall", *summary["methods"]["plain"]["topics"], "`mat`: tau", "speedup [95%]"):
        assert said in text
    for said in ("## Data", "synth:train", "disjoint by construction", "## Licence", "apache-2.0", "SGLang and vLLM"):
        assert said in text
    assert f'from_pretrained("{REPO}")' in text


def test_the_cards_metadata_validate_and_damage_is_found(run, tmp_path):
    publish.build(run, tmp_path / "out", publish.Options(REPO))
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["tags"][-2:] == ["eagle", "viskip"]
    assert head["pipeline_tag"] == "image-text-to-text"
    assert [m["type"] for m in head["model-index"][0]["results"][0]["metrics"]] == ["mat", "speedup"]
    for old, new, said in (
        ("license: apache-2.0\n", "license: other\n", "without a license_name"),
        ("license: apache-2.0\n", "license: [\n", "metadata are wrong"),
        ("license: apache-2.0\n", "license: apache-2.0\nbase_model: a b\n", "no repository of the Hub"),
        ("license: apache-2.0\n", "", "must be words"),
    ):
        with pytest.raises(InputError, match=said):
            card.validate(text.replace(old, new))


@pytest.mark.parametrize(
    ("kind", "image_input", "said", "unsaid"),
    [
        ("eagle", "embeds", ["No engine serves EAGLE heads", "refuses them"], ["```bash"]),
        ("eagle3", "embeds", ["--format sglang", "--format speculators", "--head-only", "refuses it as sglang"], []),
        ("eagle3", "aux", ["--format sglang", "`image_input: aux`", "no trees", "LLaVA-1.5"], ["refuses"]),
        ("medusa", None, ["--format vllm-medusa", "ViSkip's controller stays behind"], ["sglang", "refuses"]),
    ],
)
def test_the_card_says_what_engines_do_otherwise(run, kind, image_input, said, unsaid):
    config = SimpleNamespace(**({"image_input": image_input} if image_input else {}))
    head = replace(load(run), kind=kind, config=config)
    text = card._engines(card.Facts(REPO, head, None, None, None, []))
    assert all(words in text for words in said), text
    assert not any(words in text for words in unsaid), text


def test_plots_show_the_figures_of_the_summary():
    def method(shares: list[float]) -> dict[str, Any]:
        return {"overall": {"accept_by_depth": shares}}

    methods = {"plain": method([]), "fixed": method([0.9, 0.5]), "never": method([])}
    rows = [{"method": name, "latency_s": second} for name in methods for second in (0.5, 1.5)]
    drawn = card.plots({"methods": methods}, rows)
    assert list(drawn) == ["acceptance.svg", "latency.svg"]
    assert "fixed: 0.900" in drawn["acceptance.svg"]
    assert "fixed: 0.500" in drawn["acceptance.svg"]
    assert drawn["latency.svg"].count("<path") == 3
    assert card.plots({"methods": {"plain": method([]), "never": method([])}}, []) == {}


# ---- sending ----


def test_a_published_head_loads_elsewhere_and_gives_the_runs_own_tokens(run, hub, tmp_path, capsys):  # noqa: F811
    assert publish_now(run, "--private") == 0
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out
    repo = hub.repos[REPO]
    assert repo.private
    assert {name for name in repo.files() if not name.startswith("costs/")} == {*FILES, ".gitattributes"}
    assert len(repo.commits) == 2  # the one that made the repository, and all files in one
    picture = tmp_path / "picture.png"
    sample("val", 0).image.save(picture)
    code = (
        "import sys, mmspec\n"
        f"model = mmspec.Speculator.from_pretrained({REPO!r}, dtype='float64', policy='fixed')\n"
        f"print(*model.generate({QUESTION!r}, [sys.argv[1]], max_new_tokens=12)[0].output.tokens)\n"
    )
    env = {**os.environ, **settings(hub, tmp_path / "elsewhere")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(picture)], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    model = mmspec.Speculator.from_pretrained(run, dtype="float64", policy="fixed")
    mine = model.generate(QUESTION, [Image.open(picture)], max_new_tokens=12)[0]
    assert done.stdout.split() == [str(token) for token in mine.output.tokens]


def test_chat_works_on_a_published_folder(run, tmp_path, capsys):
    publish.build(run, tmp_path / "out", publish.Options(REPO))
    words = ["--ckpt", str(tmp_path / "out"), "--prompt", "Hello", "--max-new-tokens", "6", "--dtype", "float64"]
    assert chat.main([*words, "--compare", "--policy", "fixed"]) == 0
    assert "the same tokens" in capsys.readouterr().out


def test_publishing_again_is_one_commit_that_leaves_nothing_stale(run, hub, capsys):  # noqa: F811
    assert publish_now(run) == 0
    assert not hub.repos[REPO].private
    before = len(hub.repos[REPO].commits)
    assert publish_now(run) == 0  # nothing has changed
    assert len(hub.repos[REPO].commits) == before
    for name in ("viskip.json", "viskip.safetensors"):
        (run / name).unlink()
    hub.repos[REPO].commit("main", {**hub.repos[REPO].files(), "notes.txt": b"mine"})
    assert publish_now(run) == 0
    there = hub.repos[REPO].files()
    assert "viskip.safetensors" not in there
    assert there["notes.txt"] == b"mine"
    capsys.readouterr()
    assert publish_now(run, "--private") == 2
    assert "is public already" in capsys.readouterr().err


def test_a_revision_is_a_branch_of_its_own(run, hub):  # noqa: F811
    assert publish_now(run, "--revision", "v1") == 0
    assert set(hub.repos[REPO].files("main")) == {".gitattributes"}
    assert set(hub.repos[REPO].files("v1")) > FILES


def test_somebody_elses_repository_is_left_alone(run, hub, capsys):  # noqa: F811
    hub.put(REPO, {"model.safetensors": b"x", "README.md": b"y"})
    assert publish_now(run) == 2
    assert "holds something else (README.md, model.safetensors)" in capsys.readouterr().err
    assert set(hub.repos[REPO].files()) == {"model.safetensors", "README.md"}
    assert publish_now(run, "--overwrite") == 0
    assert hub.repos[REPO].files()["model.safetensors"] == b"x"


@pytest.mark.parametrize("token", [WRONG, ""])
def test_a_wrong_token_publishes_nothing_and_is_not_repeated(run, hub, capsys, monkeypatch, token):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert publish_now(run) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("does not accept the token" if token else "there is no token") in error
    assert WRONG not in error
    assert hub.repos == {}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            "lfs",
            f"the connection failed (RemoteProtocolError); try again; {REPO} was made and is empty, so run it again",
        ),
        ("commit", f"{REPO} was made and is empty, so run it again"),
        ("answer", f"but {REPO} has a new commit"),
    ],
)
def test_a_cut_connection_leaves_all_or_nothing(run, hub, capsys, fault, said):  # noqa: F811
    hub.faults.add(fault)
    assert publish_now(run) == 2
    error = capsys.readouterr().err
    assert said.split("; ")[-1] in error
    assert "the connection failed" in error
    assert error.count("\n") == 1
    assert set(hub.repos[REPO].files()) >= FILES if fault == "answer" else len(hub.repos[REPO].commits) == 1
    hub.faults.clear()
    assert publish_now(run) == 0  # and the same command mends it
    assert set(hub.repos[REPO].files()) > FILES
    assert len(hub.repos[REPO].commits) == 2


def test_offline_nothing_is_tried(run, hub, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert publish_now(run) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert hub.seen == []


def test_a_hub_that_is_down_is_one_line(run, hub, capsys):  # noqa: F811
    hub.faults.add("down")
    assert publish_now(run) == 2
    error = capsys.readouterr().err
    assert f"{REPO} was not published: the connection failed" in error
    assert error.count("\n") == 1
