"""Scores of answers, data of the Hub's cache, and pixel limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval.references import choice, gqa, load_references, vqa
from eval.tasks import MMSPEC_PIXELS, data_folder, limit_pixels
from mmspec.types import InputError
from tests import families, tiny
from tests.test_eval import records_in, write_records


@pytest.mark.parametrize(
    ("score", "answers", "text", "expected"),
    [
        (gqa, ["red"], "The car is Red.", 1),
        (gqa, ["red"], "The road is bored, or redder.", 0),
        (gqa, ["the fire hydrant"], "It is a fire hydrant!", 1),
        (vqa, ["stop"] * 2 + ["shop"] * 8, "The sign says STOP", 2 / 3),
        (vqa, ["stop"] * 10, "stop", 1),
        (vqa, ["12.5"], "It costs 12.5 dollars", 1),
        (vqa, ["12"], "It costs 12.5 dollars", 0),
        (choice, ["B"], "(A) is wrong. The answer is (B).", 1),
        (choice, ["(B)"], "Answer: B", 1),
        (choice, ["B"], "B.", 1),
        (choice, ["B"], "Both (B) and then (C)", 0),
        (choice, ["B"], "A bee.", 0),
    ],
)
def test_an_answer_is_scored_as_its_benchmark_scores_it(score, answers, text, expected) -> None:
    assert score(answers, text) == pytest.approx(expected)


def test_references_are_by_record_and_turn_and_a_bad_line_is_named(tmp_path: Path) -> None:
    assert load_references(tmp_path) is None
    path = tmp_path / "references.jsonl"
    lines = [
        {"id": "a", "metric": "gqa", "answers": ["yes"]},
        {"id": "a", "turn": 2, "metric": "choice", "answers": "C"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = load_references(tmp_path)
    assert found is not None
    assert [found.grade("a", 1, "Yes."), found.grade("a", 2, "(C)"), found.grade("b", 1, "yes")] == [1, 1, None]
    facts = {"b": [{"turn": 0, "kind": "colour", "expected": "red"}, {"turn": 0, "kind": "count", "expected": "two"}]}
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    found = load_references(tmp_path)
    assert found is not None
    assert found.grade("b", 1, "There are 2 blue ones") == 0.5
    for bad, words in (('{"id": "a"}', "line 1: no reference"), ('{"id": 1, "metric": "x", "answers": ["y"]}', "'x'")):
        path.write_text(bad)
        with pytest.raises(InputError, match=words):
            load_references(tmp_path)
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(InputError, match="line 1: no reference"):
        load_references(tmp_path)


@pytest.mark.parametrize(
    "facts",
    [
        b"{",
        b'{"a": "\xff"}',
        b"[1]",
        b'{"a": [1]}',
        b'{"a": [{"turn": 0}]}',
        b'{"a": [{"turn": "0", "kind": "count", "expected": "two"}]}',
        b'{"a": [{"turn": 0, "kind": "count", "expected": 2}]}',
    ],
)
def test_facts_that_are_none_are_named(facts: bytes, tmp_path: Path) -> None:
    (tmp_path / "facts.json").write_bytes(facts)
    with pytest.raises(InputError, match=r"facts\.json holds no facts"):
        load_references(tmp_path)


def test_a_dataset_of_the_hub_is_found_in_the_cache_and_a_missing_one_is_one_line(tmp_path: Path) -> None:
    stored = tmp_path / "hub" / "datasets--org--bench"
    snapshot = stored / "snapshots" / ("0" * 40)
    write_records(snapshot / "testmini", records_in(snapshot / "testmini", 3))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    code = "import sys\nfrom eval.tasks import data_folder\nfor name in sys.argv[1:]: print(data_folder(name))"
    env = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, "hub:org/bench/testmini"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert (Path(done.stdout.strip()) / "mmspec.jsonl").is_file()
    for name in ("hub:org/none-such-data", "hub:nonsense", "hub:a//b"):
        with pytest.raises(InputError, match=r"--data hub:.* cannot be fetched"):
            data_folder(name)


def test_pixel_limits_are_the_benchmark_s_for_its_target_and_refused_where_there_are_none() -> None:
    target = families.build.__wrapped__("qwen2_5_vl")  # one of its own: the others are shared by all tests
    assert limit_pixels(target, None) == MMSPEC_PIXELS["qwen2_5_vl"] == (200_704, 1_003_520)
    messages, images = families.question(0, "first")
    n = []
    for limits in ((28 * 28, 28 * 28 * 4), (28 * 28 * 16, 28 * 28 * 25)):
        assert limit_pixels(target, limits) == limits
        n.append(int(target.encode(messages, images).visual.sum()))
    assert n[0] < n[1]
    assert limit_pixels(tiny.llava(), None) is None
    with pytest.raises(InputError, match="--pixels: random-llava scales every image to one size"):
        limit_pixels(tiny.llava(), (1, 2))
