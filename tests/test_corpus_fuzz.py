"""Whatever a training set holds, reading it ends with samples and quarantine entries, and no record is forgotten."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmspec.recipe import FORMATS, Source
from mmspec.records import Quarantine, RecordError
from mmspec.types import InputError
from tests import tiny
from train.corpus import read
from train.elements import raw_records

KINDS = ("png", "jpeg", "gif", "webp")
FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMSPEC_CACHE", str(tmp_path / "cache"))
    for kind in KINDS:
        (tmp_path / f"good.{kind}").write_bytes(image_bytes(kind))
        (tmp_path / f"cut.{kind}").write_bytes(image_bytes(kind)[:60])
    return tmp_path


def image_bytes(kind: str) -> bytes:
    out = io.BytesIO()
    tiny.image(1).save(out, kind)
    return out.getvalue()


# ---- what a record may be ----

texts = st.one_of(
    st.sampled_from(["What?", "<image>\nWhat?", "a <image> b <image>", "", " ", "<image>"]), st.text(max_size=9)
)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts, st.text("\ud800\udfffé<>", max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=5,
)
names = st.sampled_from(
    [*(f"good.{kind}" for kind in KINDS), "cut.png", "none.png", "", ".", "/", "a\0b", "http://a.b/c"]
)
roles = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool"])


def mostly(good: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The good one, and in one of eight cases anything."""
    return st.integers(0, 7).flatmap(lambda n: junk if n == 0 else good)


def talks(speaker: str, said: str, contents: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Conversations that alternate, and some that do not."""
    entry = st.fixed_dictionaries({}, optional={speaker: mostly(roles), said: mostly(contents)})

    def alternating(values: list[Any]) -> list[Any]:
        return [{speaker: ("user", "assistant")[k % 2], said: value} for k, value in enumerate(values)]

    good = st.lists(mostly(contents), min_size=1, max_size=4).map(alternating)
    return st.one_of(good, good, good, st.lists(mostly(entry), max_size=3))


parts = st.lists(
    mostly(
        st.one_of(
            st.fixed_dictionaries({"type": st.just("text"), "text": mostly(texts)}),
            st.fixed_dictionaries({"type": st.just("image")}, optional={"image": mostly(names)}),
        )
    ),
    max_size=3,
)
shown = mostly(st.one_of(st.none(), names, st.lists(mostly(names), max_size=3)))
records = mostly(
    st.fixed_dictionaries(
        {},
        optional={
            "id": mostly(texts),
            "image": shown,
            "images": shown,
            "topic": mostly(texts),
            "conversations": mostly(talks("from", "value", texts)),
            "messages": mostly(talks("role", "content", st.one_of(texts, parts))),
        },
    )
)
layouts = st.sampled_from([None, *FORMATS])


def account(path: Path, layout: str | None) -> int:
    """Reads a set, uses every sample as training would, and returns the records read."""
    quarantine = Quarantine(None)
    try:
        corpus = read([Source(str(path), format=layout)], quarantine)
    except InputError:
        return quarantine.count
    assert corpus.n_read == len(corpus) + quarantine.count
    assert sum(1 for _ in corpus.samples) == len(corpus)
    for index, sample in enumerate(corpus.samples):
        assert corpus.samples.place(index) == (str(sample.file), sample.line)
        json.dumps(sample.messages(sample.answers), ensure_ascii=False).encode()
        marks = sum(part["type"] == "image" for m in sample.messages(()) for part in m["content"])
        assert marks == len(sample.pictures)
        with contextlib.suppress(RecordError):
            assert all(image.mode == "RGB" for image in sample.images())
    return corpus.n_read


@FUZZ
@given(st.lists(records, min_size=1, max_size=6), layouts, st.booleans())
def test_any_json_value_is_a_sample_or_quarantined(folder: Path, values: list[Any], layout: str | None, lines: bool):
    if lines:
        path = folder / "a.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
    else:
        path = folder / "a.json"
        path.write_text(json.dumps(values, indent=1))
    assert account(path, layout) == len(values)


@FUZZ
@given(st.lists(records, min_size=1, max_size=5), st.booleans(), st.data())
def test_any_damage_to_a_file_is_accounted_for(folder: Path, values: list[Any], lines: bool, data: st.DataObject):
    rows = "\n".join(map(json.dumps, values)) if lines else json.dumps(values, indent=1)
    raw = bytearray(rows.encode())
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        n = data.draw(st.integers(0, 9))
        raw[at : at + n] = data.draw(st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"]", b"{", b",", b"\n"])))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    path = folder / ("a.jsonl" if lines else "a.json")
    path.write_bytes(raw)
    try:
        n_found = sum(1 for _ in raw_records(path))
    except InputError:
        n_found = 0
    assert account(path, None) == n_found


# ---- tables ----

content = st.one_of(st.none(), texts)
said = st.lists(st.one_of(st.none(), st.fixed_dictionaries({"role": roles, "content": content})), max_size=3)
good_said = st.lists(texts, min_size=1, max_size=3).map(
    lambda values: [{"role": ("user", "assistant")[k % 2], "content": value} for k, value in enumerate(values)]
)
damaged = st.builds(
    lambda kind, at, bits, stop: damage(image_bytes(kind), at, bits)[:stop],
    st.sampled_from(KINDS),
    st.integers(0, 400),
    st.binary(max_size=6),
    st.one_of(st.none(), st.integers(0, 400)),
)


def damage(raw: bytes, at: int, bits: bytes) -> bytes:
    return raw[:at] + bits + raw[at + len(bits) :]


pictures = st.one_of(
    st.none(),
    st.fixed_dictionaries({"bytes": st.one_of(st.none(), damaged), "path": st.one_of(st.none(), names)}),
)
rows = st.fixed_dictionaries(
    {
        "id": st.one_of(st.none(), st.text(max_size=3)),
        "messages": st.one_of(st.none(), said, good_said, good_said),
        "images": st.one_of(st.none(), st.lists(pictures, max_size=3)),
    }
)
FEATURES = Features(
    {
        "id": Value("string"),
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "images": List({"bytes": Value("binary"), "path": Value("string")}),
    }
)


@FUZZ
@given(st.lists(rows, min_size=1, max_size=6), layouts, st.booleans())
def test_any_row_of_a_table_is_a_sample_or_quarantined(
    folder: Path, values: list[dict[str, Any]], layout: str | None, saved: bool
):
    table = Dataset.from_list(values, features=FEATURES)
    with tempfile.TemporaryDirectory(dir=folder) as inner:
        path = Path(inner) / ("saved" if saved else "a.parquet")
        for name in folder.glob("*.*"):
            shutil.copy(name, inner) if name.is_file() else None
        table.save_to_disk(path) if saved else table.to_parquet(path)
        assert account(path, layout) == len(values)
