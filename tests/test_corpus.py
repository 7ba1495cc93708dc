"""Reading training sets: every layout and every kind of file give the same samples, and the rest is accounted for."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from mmspec.recipe import Source
from mmspec.records import Quarantine
from mmspec.types import InputError
from tests import tiny
from train import elements
from train.corpus import Corpus, Part, check_sources, read
from train.elements import raw_records
from train.sample import Sample

SAID = [("user", "<image>\nWhat is it?"), ("assistant", "A cat."), ("user", "And <image>?"), ("assistant", "A dog.")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMSPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(number: int) -> bytes:
    out = io.BytesIO()
    tiny.image(number).save(out, "png")
    return out.getvalue()


def pictures(folder: Path, n: int = 4) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(n):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    return folder


def llava(number: int) -> dict[str, Any]:
    roles = {"user": "human", "assistant": "gpt"}
    said = [{"from": roles[role], "value": text} for role, text in SAID]
    return {"id": f"r{number}", "image": [f"{number % 4}.png", "1.png"], "conversations": said, "topic": "t"}


def messages(number: int, parts: bool = True) -> dict[str, Any]:
    said: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in SAID]
    if parts:
        said[0]["content"] = [{"type": "image"}, {"type": "text", "text": "\nWhat is it?"}]
        said[2]["content"] = [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "?"}]
    return {"id": f"r{number}", "messages": said, "images": [f"{number % 4}.png", "1.png"], "topic": "t"}


def embedded(number: int) -> dict[str, Any]:
    return {**messages(number, parts=False), "images": [{"bytes": png(number % 4), "path": None}, png(1)]}


def plain(value: Any) -> dict[str, Any]:
    """A record with its pictures as `datasets` stores them."""
    shown = [one if isinstance(one, dict) else {"bytes": one, "path": None} for one in value["images"]]
    return {**value, "images": shown}


def table(records: list[dict[str, Any]]) -> Dataset:
    """Records as columns, their pictures as the library's own feature."""
    said = [{"role": Value("string"), "content": Value("string")}]
    texts = {"id": Value("string"), "topic": Value("string")}
    return Dataset.from_list(records, features=Features({**texts, "messages": said, "images": List(Image())}))


def read_one(path: Path | str, quarantine: Quarantine | None = None, **more: Any) -> Corpus:
    return read([Source(str(path), **more)], quarantine or Quarantine(None))


def write_json(path: Path, records: list[Any]) -> Path:
    path.write_text(json.dumps(records, indent=1))
    return path


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path: Path, records: list[Any]) -> Path:
    table([plain(embedded(number)) for number in range(len(records))]).to_parquet(path)
    return path


def write_saved(path: Path, records: list[Any]) -> Path:
    table([plain(embedded(number)) for number in range(len(records))]).save_to_disk(path)
    return path


WAYS: dict[str, tuple[str, Callable[[int], Any], Callable[[Path, list[Any]], Path]]] = {
    "llava json": ("a.json", llava, write_json),
    "llava jsonl": ("a.jsonl", llava, write_jsonl),
    "jsonl called json": ("b.json", llava, write_jsonl),
    "messages of parts": ("a.jsonl", messages, write_jsonl),
    "messages of text": ("a.json", lambda number: messages(number, parts=False), write_json),
    "parquet": ("a.parquet", embedded, write_parquet),
    "saved folder": ("saved", embedded, write_saved),
}


def test_which_samples_have_a_picture_is_known_without_decoding_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of a whole set of embedded pictures that would read every byte, at every start."""
    records = [llava(number) for number in range(5)]
    for number in (1, 2):
        del records[number]["image"]
        for entry in records[number]["conversations"]:
            entry["value"] = entry["value"].replace("<image>", "").strip()
    samples = read_one(write_json(pictures(tmp_path) / "a.json", records)).samples
    monkeypatch.delattr(Part, "sample")
    assert samples.pictured.tolist() == [True, False, False, True, True]
    assert samples.pick([4, 2, 0]).pictured.tolist() == [True, False, True]


def test_records_without_their_picture_are_counted_and_the_first_is_named(tmp_path: Path):
    path = write_json(pictures(tmp_path) / "a.json", [llava(number) for number in range(4)])
    assert read_one(path).gone == ""
    for name in ("2.png", "3.png"):
        (tmp_path / "images" / name).unlink()
    assert f"(records without their picture: 2, the first {path}:3, 2.png; put back" in read_one(path).gone


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_in_every_file_gives_the_same_conversations(tmp_path: Path, way: str):
    name, record, write = WAYS[way]
    path = write(pictures(tmp_path) / name, [record(number) for number in range(7)])
    corpus = read_one(path)
    assert (len(corpus), corpus.n_read) == (7, 7)
    assert corpus.samples.pictured.tolist() == [True] * 7
    for number, sample in enumerate(corpus.samples):
        assert (sample.id, sample.topic, sample.line, sample.file) == (f"r{number}", "t", number + 1, path)
        assert [text.replace("\n", "") for text in sample.turns] == ["<image>What is it?", "And <image>?"]
        assert sample.answers == ("A cat.", "A dog.")
        shown = [image.tobytes() for image in sample.images()]
        assert shown == [tiny.image(number % 4).tobytes(), tiny.image(1).tobytes()]
        kinds = [part.get("text", "*") for part in sample.messages(sample.answers)[2]["content"]]
        assert kinds == ["And", "*", "?"]


def test_sharegpt_is_text_with_a_system_message(tmp_path: Path):
    said = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    path = write_json(tmp_path / "a.json", [{"id": 3, "conversations": said}, {"conversations": said[1:]}])
    first, second = read_one(path, format="sharegpt").samples
    assert (first.id, first.system, first.pictures) == ("3", "Be kind.", ())
    assert [message["role"] for message in first.messages(first.answers)] == ["system", "user", "assistant"]
    assert (second.id, second.system) == ("2", None)


def test_a_part_may_hold_its_own_picture(tmp_path: Path):
    pictures(tmp_path)
    content = [
        {"type": "text", "text": "This"},
        {"type": "image", "path": "2.png"},
        {"type": "text", "text": "or that"},
    ]
    content.append({"type": "image"})
    record = {"messages": [{"role": "user", "content": content}], "images": ["3.png"]}
    (sample,) = read_one(write_jsonl(tmp_path / "a.jsonl", [record])).samples
    assert [picture.name for picture in sample.pictures] == ["2.png", "3.png"]
    assert sample.turns == ("This<image>or that<image>",)


FLAWS: dict[str, tuple[Any, str]] = {
    "no object": ([1], "record is no object"),
    "neither layout": ({"id": "a"}, "no conversation"),
    "null text": ({"messages": [{"role": "user", "content": None}]}, "non-string text"),
    "number in a part": ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "non-string text"),
    "number as text": ({"conversations": [{"from": "human", "value": 7}]}, "non-string text"),
    "a video": ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither text nor image"),
    "entry is text": ({"messages": ["hi"]}, "no object"),
    "two users": ({"messages": [{"role": "user", "content": "a"}] * 2}, "does not alternate"),
    "late system": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "does not alternate",
    ),
    "system alone": ({"messages": [{"role": "system", "content": "b"}]}, "system message only"),
    "picture in an answer": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image> b"}], "image": "0.png"},
        "outside the user's turns",
    ),
    "more marks": (
        {"messages": [{"role": "user", "content": "<image><image>a"}], "images": ["0.png"]},
        "2 <image> for 1",
    ),
    "no pictures": ({"messages": [{"role": "user", "content": "<image>a"}], "images": []}, "1 <image> for 0"),
    "fewer marks": (
        {"messages": [{"role": "user", "content": "<image>a"}], "images": ["0.png"] * 2},
        "1 <image> for 2",
    ),
    "missing picture": (
        {"messages": [{"role": "user", "content": "a"}], "images": ["9.png"]},
        "image is missing: 9.png",
    ),
    "a number as picture": ({"messages": [{"role": "user", "content": "a"}], "images": [4]}, "image is no file name"),
    "empty picture": ({"messages": [{"role": "user", "content": "a"}], "images": [{"path": None}]}, "image is no file"),
    "web address": ({"messages": [{"role": "user", "content": "a"}], "image": "https://x.y/z.png"}, "web address"),
    "very long name": ({"messages": [{"role": "user", "content": "a"}], "image": "x" * 5000}, "image name is no path"),
    "surrogate in a text": ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
    "surrogate in the id": (
        {"id": "\ud800", "messages": [{"role": "user", "content": "a"}]},
        "id is not valid Unicode",
    ),
    "surrogate in a name": ({"messages": [{"role": "user", "content": "a"}], "image": "\ud800"}, "name is not valid"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flawed_record_is_one_entry_with_reason_source_and_line(tmp_path: Path, flaw: str):
    record, reason = FLAWS[flaw]
    path = write_jsonl(pictures(tmp_path) / "a.jsonl", [llava(0), record, llava(2)])
    quarantine = Quarantine(tmp_path / "q.jsonl")
    corpus = read_one(path, quarantine)
    assert [sample.id for sample in corpus.samples] == ["r0", "r2"]
    entry = json.loads((tmp_path / "q.jsonl").read_text())
    assert (entry["source"], entry["line"]) == (str(path), 2)
    assert reason in entry["reason"]


def test_a_forced_layout_reads_no_other(tmp_path: Path):
    path = write_jsonl(pictures(tmp_path) / "a.jsonl", [llava(0), messages(1)])
    for layout, kept in ((None, ["r0", "r1"]), ("llava", ["r0"]), ("messages", ["r1"])):
        assert [sample.id for sample in read_one(path, format=layout).samples] == kept
    with pytest.raises(InputError, match="no usable record among the 2"):
        read_one(path, format="sharegpt")


def test_what_cannot_be_decoded_is_listed_even_where_a_topic_is_asked_for(tmp_path: Path):
    good = json.dumps({**llava(0), "topic": "charts"})
    (pictures(tmp_path) / "a.jsonl").write_text("\n".join([good, "{broken", json.dumps(llava(1))]))
    quarantine = Quarantine(tmp_path / "q.jsonl")
    corpus = read_one(tmp_path / "a.jsonl", quarantine, topic="charts")
    assert (len(corpus), corpus.n_read, quarantine.count) == (1, 2, 1)
    assert json.loads((tmp_path / "q.jsonl").read_text())["line"] == 2


def test_malformed_lines_are_single_bad_records(tmp_path: Path):
    good = json.dumps(llava(0)).encode()
    lines = [good, b"{broken", b"", b'{"id": "\xff"}', good, b"[" * 100_000, good[: len(good) // 2]]
    (pictures(tmp_path) / "a.jsonl").write_bytes(b"\r\n".join(lines))
    quarantine = Quarantine(tmp_path / "q.jsonl")
    corpus = read_one(tmp_path / "a.jsonl", quarantine)
    assert [sample.line for sample in corpus.samples] == [1, 5]
    entries = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in entries] == [2, 4, 6, 7]
    assert ["UTF-8" in entry["reason"] for entry in entries] == [False, True, False, False]
    assert corpus.n_read == len(corpus) + quarantine.count


def test_a_list_that_is_cut_off_keeps_what_came_before(tmp_path: Path):
    whole = json.dumps([llava(number) for number in range(3)], indent=2).encode()
    second = whole.index(b'"id": "r1"')
    for n in range(second, len(whole) - 1, 37):
        (pictures(tmp_path) / "a.json").write_bytes(whole[:n])
        quarantine = Quarantine(None)
        corpus = read_one(tmp_path / "a.json", quarantine)
        assert corpus.n_read == len(corpus) + quarantine.count
        assert quarantine.count == 1, "the record in which the file ends, or that the list has no end"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_a_list_is_split_the_same_in_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    values = ['a"]\\', {"x": [1, {"y": '}\\"'}], "z": "\n"}, 3, None, [], [[]], "", {"é": "\\\\"}]
    for text in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False)):
        path = tmp_path / "a.json"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr(elements, "CHUNK", chunk)
        assert [json.loads(raw) for _, raw in raw_records(path)] == values


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"{", "no JSON list"),
        ("a.json", b"3", "not a int"),
        ("a.json", b"", "no JSON list"),
        ("a.jsonl", b"", "no usable record among the 0"),
        ("a.json", b'{"train": []}', "no usable record among the 1"),
        ("a.parquet", b"PAR1 no table", "cannot be read"),
        ("a.jsonl", b'{"messages": 1}', "empty conversation"),
    ],
)
def test_a_file_that_is_no_data_is_one_line(tmp_path: Path, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_one(tmp_path / name)
    assert "\n" not in str(caught.value)


# ---- folders, splits and the Hub ----


def test_splits_of_a_saved_set_and_shards_of_a_folder(tmp_path: Path):
    sets = {name: table([plain(embedded(k)) for k in range(n)]) for name, n in (("train", 3), ("val", 2))}
    DatasetDict(sets).save_to_disk(tmp_path / "saved")
    (tmp_path / "shards").mkdir()
    for name in sets:
        sets[name].to_parquet(tmp_path / "shards" / f"{name}-00000.parquet")
    for folder in ("saved", "shards"):
        check_sources([Source(str(tmp_path / folder))])
        assert len(read_one(tmp_path / folder)) == 3
        assert len(read_one(tmp_path / folder, split="val")) == 2
        with pytest.raises(InputError, match="tset"):
            read_one(tmp_path / folder, split="tset")
    with pytest.raises(InputError, match="has no splits"):
        read_one(write_jsonl(tmp_path / "a.jsonl", [llava(0)]), split="val")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("0000", "0001"), None),
        (("part-0", "part-1-x"), None),
        (("test-00000-of-00002", "test-00001-of-00002"), None),
        (("test-00000-of-00001", "validation-00000-of-00001"), "test, validation"),
        (("set_test-0", "set_val-0"), "set_test, set_val"),
    ],
)
def test_a_folder_of_shards_is_read_whole_only_where_they_are_of_one_split(
    tmp_path: Path, names: tuple[str, str], splits: str | None
):
    for number, name in enumerate(names):
        table([plain(embedded(number))]).to_parquet(tmp_path / f"{name}.parquet")
    if splits is None:
        assert len(read_one(tmp_path)) == 2
        return
    with pytest.raises(InputError, match=f"has several splits; give split, one of: {splits}$"):
        read_one(tmp_path)
    assert len(read_one(tmp_path, split=splits.partition(",")[0])) == 1


def test_a_set_of_the_hub_that_is_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hub:nobody/nothing cannot be read") as caught:
        read_one("hub:nobody/nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="must be hub:org/name"):
        read_one("hub:nothing")


# ---- caches, digests and laziness ----


def test_a_changed_file_of_the_same_name_is_read_anew(tmp_path: Path, cache: Path):
    path, digests = tmp_path / "a.jsonl", []
    for text in ("one", "two", "one"):
        write_jsonl(path, [{"messages": [{"role": "user", "content": text}]}])
        corpus = read_one(path)
        assert corpus.samples[0].turns == (text,)
        digests.append(corpus.digest)
    assert digests[0] == digests[2] != digests[1]
    assert len(list(cache.rglob("*.arrow"))) == 2


def test_the_digest_is_of_conversations_and_pictures(tmp_path: Path):
    digests = set()
    for change in (lambda r: r, lambda r: {**r, "images": r["images"][::-1]}, lambda r: {**r, "id": "other"}):
        record = change(plain(embedded(0)))
        table([record]).to_parquet(tmp_path / "a.parquet")
        digests.add(read_one(tmp_path / "a.parquet").digest)
    assert len(digests) == 3 - (len(png(0)) == len(png(1)))
    write_jsonl(pictures(tmp_path) / "a.jsonl", [llava(0)])
    before = read_one(tmp_path / "a.jsonl").digest
    (tmp_path / "images" / "0.png").write_bytes(png(0) + b"more")
    assert read_one(tmp_path / "a.jsonl").digest != before


def test_samples_are_a_sequence_over_all_sources(tmp_path: Path):
    pictures(tmp_path)
    first = write_jsonl(tmp_path / "a.jsonl", [llava(0), 1, llava(2)])
    second = write_json(tmp_path / "b.json", [messages(3), messages(4), messages(5)])
    corpus = read([Source(str(first), weight=2.0), Source(str(second), weight=0.5, limit=2)], Quarantine(None))
    assert [sample.id for sample in corpus.samples] == ["r0", "r2", "r3", "r4"]
    assert corpus.weights.tolist() == [2.0, 2.0, 0.5, 0.5]
    assert corpus.samples[-1].id == "r4"
    assert [sample.id for sample in corpus.samples[1:3]] == ["r2", "r3"]
    assert corpus.samples.turns.tolist() == [2] * 4
    for index, sample in enumerate(corpus.samples):
        assert corpus.samples.place(index) == (str(sample.file), sample.line)
        assert corpus.samples.find(*corpus.samples.place(index)) == [index]
        assert corpus.samples[index] == sample
    assert corpus.samples.find(str(first), 2) == corpus.samples.find(str(second), 3) == [], "bad, and beyond the limit"
    twice = read([Source(str(first)), Source(str(first))], Quarantine(None)).samples
    assert twice.find(str(first), 3) == [1, 3]
    with pytest.raises(IndexError):
        corpus.samples[4]
    picked = corpus.samples.pick([3, 1])
    assert [sample.id for sample in picked] == [picked[0].id, picked[-1].id] == ["r2", "r4"]
    assert picked.turns.tolist() == [2, 2]


def test_reading_holds_a_few_bytes_a_record(tmp_path: Path):
    """Python's own memory after reading 400 and 4,000 records: less than 40 bytes more for each."""
    held = []
    record = {"conversations": [{"from": "human", "value": "why " * 50}, {"from": "gpt", "value": "because " * 50}]}
    for n in (400, 4000):
        path = write_jsonl(tmp_path / f"{n}.jsonl", [{"id": str(k), **record} for k in range(n)])
        read_one(path)
        tracemalloc.start()
        corpus = read_one(path)
        assert isinstance(corpus.samples[n - 1], Sample)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(corpus) == n
    assert held[1] - held[0] < 40 * 3600


def test_a_scan_leaves_the_bytes_of_pictures_on_disk(tmp_path: Path):
    path = tmp_path / "a.parquet"
    heavy = [{**plain(embedded(k)), "images": [{"bytes": bytes(200_000), "path": "x.png"}] * 2} for k in range(200)]
    table(heavy).to_parquet(path)
    read_one(path)
    tracemalloc.start()
    corpus = read_one(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000, "40 MB of pictures"
    assert [len(picture.data or b"") for picture in corpus.samples[7].pictures] == [200_000, 200_000]
