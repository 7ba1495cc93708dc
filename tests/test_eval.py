"""Evaluation end to end on a random target: what is written, that nothing changes the text, and every bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval import mmspec as cli
from eval.lineup import choose_heads, make_methods
from mmspec import checkpoint
from mmspec.checkpoint import DraftTree
from mmspec.heads import medusa as medusa_head
from mmspec.methods import method_names, resolved
from mmspec.targets import load_target
from tests import tiny

TOPICS = ("general vqa", "image captioning", "multi-turn conversation")
FIGURES = {
    "mat",
    "mat_without_bonus",
    "mat_untruncated",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "latency_p50_s",
    "latency_p90_s",
    "tokens_per_s",
    "exact_match",
    "ties",
    "skip_rate",
    "n_requests",
    "accept_by_depth",
    "ttft_p50_s",
}


def records_in(folder: Path, n: int = 9) -> list[dict[str, Any]]:
    """`n` good records over three topics; every third is a conversation of two turns. Images are written."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(n):
        tiny.image(i).save(folder / "images" / f"r{i}.png")
        turns = [f"w{i} w{i + 3} w{2 * i}"] + (["w5 w7"] if i % 3 == 2 else [])
        records.append({"id": f"r{i}", "image": f"r{i}.png", "turns": turns, "category": "c", "topic": TOPICS[i % 3]})
    return records


def write_records(folder: Path, records: list[Any]) -> Path:
    (folder / "mmspec.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run_folder(tmp_path_factory.mktemp("runs") / "random", tiny.llava(), DraftTree(4, 3, 6))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return write_records(folder, records_in(folder))


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, run_folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs the CLI in this process on the random target, in fp64 so that equality has no exception."""
    monkeypatch.setattr(cli, "load_target", lambda name, dtype, device: tiny.llava(dtype=dtype))

    def call(*words: str, ckpt: bool = True) -> int:
        given = ["--dtype", "float64", "--max-new-tokens", "12", "--out", str(tmp_path / "out")]
        return cli.main([*given, *(["--ckpt", str(run_folder)] if ckpt else []), *words])

    return call


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "requests.jsonl").read_text().splitlines()]


def test_a_run_writes_a_summary_rows_and_a_report_that_agree(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("--data", str(data)) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    rows = rows_of(out)
    assert set(summary) >= {"schema", "primary", "methods", "settings", "versions", "hardware", "definitions"}
    assert summary["primary"] == "viskip"
    assert list(summary["methods"]) == ["plain", "eagle", "viskip"]
    for method in summary["methods"].values():
        assert set(method["topics"]) == set(TOPICS)
        for row in (method["overall"], *method["topics"].values()):
            assert set(row) >= FIGURES
            assert row["exact_match"] == 1.0
            assert row["ties"] == row["diverged"] == 0
    assert len(rows) == 3 * 12, "9 records, 3 of them with two turns, by 3 methods"
    for name, method in summary["methods"].items():
        mine = [row for row in rows if row["method"] == name]
        emitted = [sum(round[4] for round in row["rounds"]) for row in mine]
        assert emitted == [len(row["output_ids"]) - 1 for row in mine], "every token but the prefill's is of a round"
        assert method["overall"]["mat"] == pytest.approx(sum(emitted) / sum(len(row["rounds"]) for row in mine))
        assert method["overall"]["n_requests"] == 12
    assert summary["methods"]["plain"]["overall"]["mat"] == 1.0
    assert summary["methods"]["plain"]["overall"]["speedup"] == 1.0
    assert summary["methods"]["eagle"]["overall"]["skip_rate"] < 0.5
    assert {key: summary[key] for key in FIGURES} == {
        key: summary["methods"]["viskip"]["overall"][key] for key in FIGURES
    }
    page = (out / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert all(topic in page for topic in TOPICS)
    printed = capsys.readouterr().out
    assert "multi-turn conversation" in printed
    assert "report.html" in printed
    assert not (out / "quarantine.jsonl").exists()


def test_all_methods_decode_the_same_prompts_also_in_later_turns(
    evaluate: Callable[..., int], data: Path, tmp_path: Path
) -> None:
    assert evaluate("--data", str(data)) == 0
    lengths: dict[tuple[str, int], set[int]] = {}
    for row in rows_of(tmp_path / "out"):
        lengths.setdefault((row["id"], row["turn"]), set()).add(row["prompt_tokens"])
    assert all(len(values) == 1 for values in lengths.values())
    # Turn 2 holds turn 1, its answer and two more words.
    assert min(lengths["r2", 2]) > min(lengths["r2", 1]) + 3


PENALISED = ("--temperature", "0.8", "--repetition-penalty", "1.1", "--no-repeat-ngram", "2", "--share-noise")


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1.0", "--top-p", "0.9", "--seed", "3"), PENALISED])
def test_neither_batch_size_nor_limit_changes_the_text(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, sampling: tuple[str, ...]
) -> None:
    texts = []
    for words in (("--batch-size", "1"), ("--batch-size", "3"), ("--limit", "6")):
        assert evaluate("--data", str(data), *words, *sampling) == 0
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["exact_match"] == 1.0
        texts.append({(r["id"], r["turn"], r["method"]): r["output_ids"] for r in rows_of(tmp_path / "out")})
    assert texts[0] == texts[1]
    assert len(texts[2]) == 3 * 8, "6 records, two of each topic"
    assert texts[2].items() <= texts[0].items()


@pytest.mark.parametrize("shape", [(), ("--draft-widths", "2", "2")])
def test_a_run_verified_by_rejection_claims_no_exact_match(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, shape: tuple[str, ...]
) -> None:
    assert evaluate("--data", str(data), "--limit", "4", "--temperature", "1", "--verifier", "rejection", *shape) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["settings"]["verifier"] == "rejection"
    assert summary["methods"]["plain"]["overall"]["exact_match"] == 1.0
    for figures in (summary, *(summary["methods"][name]["overall"] for name in ("eagle", "viskip"))):
        assert figures["exact_match"] is figures["ties"] is figures["diverged"] is None
        assert figures["mat"] >= 1
    for row in rows_of(tmp_path / "out"):
        assert (row["identical"] is None) == (row["method"] != "plain")
    assert "equal in distribution, not in text" in (tmp_path / "out" / "report.html").read_text()


def test_a_checkpoint_without_a_controller_is_scored_with_its_fixed_tree(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("head.json", "head.safetensors", "tree.json"):
        (bare / name).write_bytes((run_folder / name).read_bytes())
    assert evaluate("--data", str(data), "--ckpt", str(bare), "--limit", "3", ckpt=False) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["primary"] == "eagle"
    assert evaluate("--data", str(data), "--ckpt", str(bare), "--policies", "viskip", ckpt=False) == 2
    assert "has no controller" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", [(), ("--temperature", "1", "--share-noise", "--batch-size", "3")])
def test_a_fitted_static_tree_is_scored_beside_the_dynamic_one(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, run_folder: Path, sampling: tuple[str, ...]
) -> None:
    fitted = tmp_path / "fitted"
    shutil.copytree(run_folder, fitted)
    (fitted / "static_tree.json").write_text('{"paths": [[0], [0, 0], [1], [0, 1], [0, 0, 0]]}')
    words = ("--ckpt", str(fitted), "--policies", "fixed", "static")
    assert evaluate("--data", str(data), "--limit", "4", *words, *sampling, ckpt=False) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["methods"]) == ["plain", "eagle", "eagle_static"]
    assert summary["exact_match"] == 1.0
    how = summary["settings"]["methods"]["eagle_static"]
    tree = {"tree": "static_tree.json", "depth": 3, "budget": 5}
    assert how == {"drafter": "eagle", "checkpoint": "fitted", "policy": "fixed", **tree}
    nodes = {
        entry[1] for row in rows_of(tmp_path / "out") if row["method"] == "eagle_static" for entry in row["rounds"]
    }
    assert max(nodes) == 5


@pytest.fixture
def hybrid_of_pld(tmp_path: Path) -> str:
    """Settings of a hybrid that copies now and then even from random text."""
    path = tmp_path / "settings.yaml"
    path.write_text("hybrid: {retrieval: pld, min_match: 1, settings: {num_pred: 4}}\npld: {max_ngram: 2}\n")
    return str(path)


@pytest.mark.parametrize(
    "sampling", [(), pytest.param(("--temperature", "1", "--batch-size", "3"), marks=pytest.mark.slow)]
)
def test_all_methods_are_scored_beside_a_head(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, hybrid_of_pld: str, sampling: tuple[str, ...]
) -> None:
    words = ("--data", str(data), "--limit", "3", "--method", "all", "--method-settings", hybrid_of_pld)
    assert evaluate(*words, *sampling) == 0
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["methods"]) == ["plain", *method_names(), "hybrid", "eagle", "viskip"]
    assert summary["primary"] == "viskip"
    for method in summary["methods"].values():
        assert method["overall"]["exact_match"] == 1.0
    how = summary["settings"]["methods"]
    assert how["pld"] == {"drafter": "pld", "policy": "adaptive", **resolved("pld", {"max_ngram": 2})}
    assert how["hybrid"]["settings"] == resolved("pld", {"num_pred": 4})
    assert {row["method"] for row in rows_of(out)} == set(summary["methods"])
    assert all(f">{name}</" in (out / "report.html").read_text() for name in summary["methods"])


def test_methods_need_no_checkpoint(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(data), "--dtype", "float64", "--max-new-tokens", "8", "--limit", "2"]
    assert cli.main(["--method", "pld", "pld", *words]) == 0
    summary = json.loads((tmp_path / "runs" / "eval-pld" / "summary.json").read_text())
    assert list(summary["methods"]) == ["plain", "pld"]
    assert summary["primary"] == "pld"
    assert summary["exact_match"] == 1.0
    assert summary["settings"]["checkpoint"] is None
    assert evaluate("--data", str(data), "--limit", "2", "--method", "all", ckpt=False) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["methods"]) == ["plain", *method_names()]
    assert summary["primary"] == method_names()[-1]
    assert "random-llava on " in (tmp_path / "out" / "report.html").read_text()


def test_several_heads_share_one_baseline_each_under_a_name_and_with_a_tree_of_its_own(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin, medusa = tmp_path / "twin", tmp_path / "medusa"
    shutil.copytree(run_folder, twin)
    for name in ("viskip.json", "viskip.safetensors"):
        (twin / name).unlink()
    target = tiny.llava()
    config = medusa_head.Config().resolve(target.shape)
    checkpoint.save_head(medusa, medusa_head.Head(config).state_dict(), config, target)
    checkpoint.save_tree(medusa, DraftTree(2, 2, 4))
    (medusa / "static_tree.json").write_text('{"paths": [[0], [1], [0, 0]]}')
    words = [word for folder in (twin, medusa) for word in ("--ckpt", str(folder))]
    words += [
        "--data",
        str(data),
        "--limit",
        "3",
        "--method",
        "hybrid",
        "pld",
        "--policies",
        "viskip",
        "static",
        "fixed",
    ]
    words += ["--tree", "2", "3", "5", "--tree", "1", "1", "1", "--tree", "2", "1", "2"]
    assert evaluate(*words) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    expected = ["plain", "random_hybrid", "twin_hybrid", "medusa_hybrid", "pld", "random", "viskip", "twin", "medusa"]
    assert list(summary["methods"]) == [*expected, "medusa_static"]
    assert summary["primary"] == "medusa_static"
    for method in summary["methods"].values():
        assert method["overall"]["exact_match"] == 1.0
    how = summary["settings"]["methods"]
    assert [how[name]["budget"] for name in ("random", "viskip", "twin", "medusa", "medusa_static")] == [5, 5, 1, 2, 3]
    assert [how[name]["checkpoint"] for name in ("random", "twin", "medusa")] == ["random", "twin", "medusa"]
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 10 * 4, "3 records, one of them with two turns: plain decoding runs once for all heads"
    nodes = {name: max(entry[1] for row in rows if row["method"] == name for entry in row["rounds"]) for name in how}
    assert (nodes["random"], nodes["twin"], nodes["medusa"]) == (5, 1, 2)
    assert evaluate("--ckpt", str(twin), "--tree", "1", "1", "1", "--tree", "1", "1", "1", "--tree", "1", "1", "1") == 2
    assert "--tree is given once, or once for each --ckpt; got 3 for 2" in capsys.readouterr().err
    assert evaluate("--data", str(data), "--ckpt", str(run_folder)) == 2
    assert "two run folders are both called random_4x3x6" in capsys.readouterr().err
    assert evaluate(*words[:4], "--data", str(data), "--method", "one_hybrid") == 2
    assert (
        "--method one_hybrid: no --ckpt has a head of that name; use random_hybrid, twin_hybrid, medusa_hybrid, or"
        in capsys.readouterr().err
    )
    heads = choose_heads([str(twin), str(medusa)])
    methods, _ = make_methods(target, heads, 1, named=["medusa_hybrid"], budget="fixed")
    assert [method.name for method in methods] == ["plain", "medusa_hybrid", "eagle", "medusa"]


BAD_METHODS = [
    ((), "give --ckpt DIR, or --method all"),
    (("--method", "pdl"), "--method pdl is unknown; use "),
    (("--method", "pld", "null"), "--method null is unknown"),
    (("--method", "hybrid"), "--method hybrid needs --ckpt"),
    (("--method", "eagle_hybrid"), "--method hybrid needs --ckpt"),
    (("--method", "pld", "--policies", "fixed"), "--policies needs --ckpt"),
    (("--method", "pld", "--temperature", "1", "--share-noise"), "--share-noise needs --ckpt"),
    (
        ("--method", "pld", "--temperature", "1", "--verifier", "rejection"),
        "--verifier rejection needs candidates drawn",
    ),
    (("--method", "pld", "--method-settings", "nowhere.yaml"), "nowhere.yaml does not exist"),
    (("--method", "pld", "--method-settings", "FILE"), "did you mean 'num_pred'?"),
]


@pytest.mark.parametrize(("words", "message"), BAD_METHODS)
def test_each_bad_choice_of_methods_is_one_line_and_exit_code_2(
    evaluate: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("pld: {num_perd: 3}\n")
    assert evaluate(*(str(wrong) if word == "FILE" else word for word in words), ckpt=False) == 2
    written = capsys.readouterr()
    assert written.err.startswith("eval.mmspec: error: ")
    assert message in written.err
    assert written.err.count("\n") == 1
    assert written.out == ""


def test_unusable_records_are_quarantined_and_counted_while_the_run_goes_on(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    records = records_in(folder, 12)
    records[0]["image"] = "none.png"
    whole = (folder / "images" / "r1.png").read_bytes()
    (folder / "images" / "r1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images" / "r3.png").write_text("not an image")
    records[4]["turns"] = []
    records[6]["turns"] = ["w1 " * 400]
    records[8]["turns"] = ["w1", "w2 " * 400]
    write_records(folder, records)
    assert evaluate("--data", str(folder), "--max-bad-share", "0.5") == 0
    out = tmp_path / "out"
    reasons = {e["id"]: e["reason"] for e in map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())}
    assert set(reasons) == {"r0", "r1", "r3", "r4", "r6", "r8"}
    for name, part in (("r0", "missing"), ("r1", "decoded"), ("r3", "readable"), ("r4", "empty"), ("r6", "context")):
        assert part in reasons[name]
    assert "turn 2" in reasons["r8"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["quarantined"]["count"] == 6
    assert summary["exact_match"] == 1.0
    assert {(r["id"], r["turn"]) for r in rows_of(out) if r["id"] == "r8"} == {("r8", 1)}
    assert "quarantined: 6" in capsys.readouterr().out
    assert evaluate("--data", str(folder)) == 2
    message = capsys.readouterr().err
    assert message.startswith("eval.mmspec: error: 4 of 12 records are unusable (33.3%, allowed 5.0%)")
    assert message.count("\n") == 1
    assert len((out / "quarantine.jsonl").read_text().splitlines()) == 4, "a new run lists its own only"


BAD_OPTIONS = [
    (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
    (("--batch-size", "-3"), "--batch-size must be at least 1, got -3"),
    (("--batch-size", "two"), "--batch-size: invalid int value: 'two'"),
    (("--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
    (("--max-new-tokens", "-5"), "--max-new-tokens must be at least 1, got -5"),
    (("--limit", "0"), "--limit must be at least 1, got 0"),
    (("--temperature", "-1"), "--temperature: must be 0 (greedy) or a positive number, got -1"),
    (("--temperature", "hot"), "--temperature: must be 0 (greedy) or a positive number, got hot"),
    (("--temperature", "nan"), "--temperature: must be 0 (greedy) or a positive number, got nan"),
    (("--top-p", "0"), "argument --top-p: must be above 0 and at most 1, got 0"),
    (("--top-k", "-1"), "--top-k must be at least 0, got -1"),
    (("--repetition-penalty", "0"), "--repetition-penalty must be a positive number (1 is off), got 0.0"),
    (("--no-repeat-ngram", "-1"), "--no-repeat-ngram must be at least 0, got -1"),
    (("--verifier", "rejection"), "--verifier rejection needs a --temperature above 0"),
    (("--share-noise",), "--share-noise needs a --temperature above 0 and --verifier match"),
    (("--temperature", "1", "--draft-widths", "2"), "--draft-widths needs --verifier rejection"),
    (("--temperature", "1", "--verifier", "rejection", "--policies", "static"), "needs drawn candidates"),
    (("--temperature", "1", "--verifier", "rejection", "--policies", "marginal"), "needs drawn candidates"),
    (("--method", "pld", "--method-budget", "marginal", "--frozen"), "--frozen: --method-budget marginal goes by"),
    (("--policies", "static"), "static_tree.json"),
    (("--seed", "-1"), "--seed must be at least 0, got -1"),
    (("--max-bad-share", "nan"), "--max-bad-share: must be between 0 and 1, got nan"),
    (("--max-bad-share", "1.5"), "--max-bad-share: must be between 0 and 1, got 1.5"),
    (("--device", "toaster"), "--device 'toaster' is unknown"),
    (("--device", "cuda:99"), "--device cuda:99 is not on this machine"),
    (("--dtype", "int3"), "--dtype: invalid choice: 'int3'"),
    (("--data", "synth:trian"), "unknown data 'synth:trian'; use synth:testmini"),
    (("--data", "/nowhere/at/all"), "data folder not found: /nowhere/at/all"),
    (("--ckpt", "/nowhere/at/all"), "checkpoint /nowhere/at/all does not exist"),
    (("--temprature", "1"), "unrecognized arguments: --temprature"),
    (("--method-settings", "a.yaml"), "--method-settings needs --method"),
]


@pytest.mark.parametrize(("words", "message"), BAD_OPTIONS)
def test_each_bad_option_is_one_line_and_exit_code_2(
    evaluate: Callable[..., int], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert evaluate(*words) == 2
    written = capsys.readouterr()
    assert written.err.startswith("eval.mmspec: error: ")
    assert message in written.err
    assert written.err.count("\n") == 1
    assert written.out == ""


def test_bad_folders_are_one_line_and_exit_code_2(
    evaluate: Callable[..., int], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    imageless = tmp_path / "imageless"
    imageless.mkdir()
    write_records(imageless, [{"id": "a", "image": "a.png", "turns": ["w1"], "category": "", "topic": "t"}])
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    write_records(hollow, [])
    file = tmp_path / "file"
    file.write_text("")
    for words, message in (
        (("--ckpt", str(empty)), "is empty"),
        (("--ckpt", str(data)), "is incomplete: it has no head.json"),
        (("--data", str(empty)), "no mmspec.jsonl in"),
        (("--data", str(hollow)), "no usable record among the 0"),
        (("--data", str(imageless)), "no usable record in"),
        (("--data", str(data), "--out", str(file)), "cannot be written"),
    ):
        assert evaluate(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("eval.mmspec: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_a_checkpoint_of_another_target_is_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., int], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_target", lambda name, dtype, device: tiny.llava(seed=1))
    assert evaluate("--data", str(data)) == 2
    error = capsys.readouterr().err
    assert "was made for random-llava with target fingerprint" in error
    monkeypatch.setattr(cli, "load_target", load_target)
    assert evaluate("--data", str(data), "--target", "/nowhere/at/all") == 2
    error = capsys.readouterr().err
    assert "/nowhere/at/all" in error
    assert error.count("\n") == 1


def test_a_question_is_shown_as_text_not_as_markup(evaluate: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    records = records_in(folder, 3)
    records[0]["turns"] = ["<script>alert(1)</script> & w1"]
    records[1]["topic"] = "<b>bold</b>"
    Image.new("P", (700, 20)).save(folder / "images" / "r1.png")
    assert evaluate("--data", str(write_records(folder, records))) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page
    assert "<b>bold</b>" not in page
    assert "&lt;script&gt;" in page


def test_an_answer_of_one_token_has_no_mat(evaluate: Callable[..., int], data: Path, tmp_path: Path) -> None:
    assert evaluate("--data", str(data), "--limit", "3", "--max-new-tokens", "1", "--policies", "fixed") == 0
    text = (tmp_path / "out" / "samples.json").read_text()
    samples = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {sample["mat"] for sample in samples} == {None}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "MAT -" in page
    assert "MAT nan" not in page


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "eval.mmspec", *words], capture_output=True, text=True, timeout=120
        )

    done = call("--ckpt", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("eval.mmspec: error: ")
    assert "Traceback" not in done.stderr
