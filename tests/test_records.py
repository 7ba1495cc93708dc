"""Records: every kind of damage ends in one quarantine line or one clear error, and never in a crash."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmspec.records import Quarantine, RecordError, open_image, read_mmspec
from mmspec.types import InputError

GOOD: dict[str, Any] = {"id": "r1", "image": "a.png", "turns": ["What is it?"], "category": "c", "topic": "general vqa"}


def folder_of(tmp_path: Path, *lines: Any) -> Path:
    """A data folder whose lines are given as objects (dumped) or bytes (as they are)."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "images" / "a.png")
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "mmspec.jsonl").write_bytes(b"\n".join(raw) + b"\n")
    return folder


def test_a_good_record_is_read_with_its_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, b"", {**GOOD, "turns": ["One?", "Two?"]}, {**GOOD, "id": 7, "image": None})
    quarantine = Quarantine(tmp_path / "q.jsonl")
    first, second = read_mmspec(folder, quarantine)
    assert first.turns == ("One?", "Two?")
    assert first.image == folder / "images" / "a.png"
    assert (first.id, first.topic, first.category, first.line) == ("r1", "general vqa", "c", 2)
    assert (second.id, second.image) == ("7", None)
    assert quarantine.count == 0
    assert not (tmp_path / "q.jsonl").exists(), "no file when nothing is wrong"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{broken", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[1, 2]", "not a JSON object"),
        (b"[" * 100000, "not JSON"),
        ({k: v for k, v in GOOD.items() if k != "id"}, "no 'id' field"),
        ({k: v for k, v in GOOD.items() if k != "image"}, "no 'image' field"),
        ({k: v for k, v in GOOD.items() if k != "turns"}, "no 'turns' field"),
        ({k: v for k, v in GOOD.items() if k != "topic"}, "no 'topic' field"),
        ({**GOOD, "turns": []}, "conversation is empty"),
        ({**GOOD, "turns": "What?"}, "'turns' is a str, not a list"),
        ({**GOOD, "turns": ["ok", 3]}, "turn 2 is a int, not text"),
        ({**GOOD, "turns": ["ok", " \n"]}, "turn 2 is blank"),
        ({**GOOD, "turns": [None]}, "turn 1 is a NoneType"),
        ({**GOOD, "id": True}, "'id' is a bool"),
        ({**GOOD, "id": {}}, "'id' is a dict"),
        ({**GOOD, "image": 5}, "'image' is a int"),
        ({**GOOD, "image": ""}, "'image' is blank"),
        ({**GOOD, "topic": None}, "'topic' is a NoneType"),
        (b'{"id": "x", "image": "a.png", "turns": ["\\ud800"], "topic": "t"}', "turn 1 is not valid Unicode"),
        ({**GOOD, "id": "keep"}, "used by an earlier record"),
    ],
)
def test_each_bad_line_is_quarantined_with_its_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    folder = folder_of(tmp_path, {**GOOD, "id": "keep"}, bad)
    quarantine = Quarantine(tmp_path / "out" / "q.jsonl")
    records = read_mmspec(folder, quarantine)
    assert [record.id for record in records] == ["keep"]
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "q.jsonl").read_text().splitlines()]
    assert set(entry) == {"source", "line", "id", "reason"}
    assert entry["line"] == 2
    assert reason in entry["reason"]
    assert quarantine.count == 1
    assert quarantine.reasons() == {entry["reason"].partition(":")[0]: 1}


def test_a_folder_that_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match=r"data folder not found: .*nowhere"):
        read_mmspec(tmp_path / "nowhere", quarantine)
    with pytest.raises(InputError, match=r"no mmspec\.jsonl in"):
        read_mmspec(tmp_path, quarantine)
    with pytest.raises(InputError, match="no usable record among the 0"):
        read_mmspec(folder_of(tmp_path, b""), quarantine)
    with pytest.raises(InputError, match=r"no usable record among the 2 .*conversation is empty") as caught:
        read_mmspec(folder_of(tmp_path, {**GOOD, "turns": []}, {**GOOD, "turns": []}), quarantine)
    assert "\n" not in str(caught.value)


def test_mutated_files_never_crash_the_reader(tmp_path: Path) -> None:
    # 300 files with random bytes flipped, cut or doubled: each line is either a record or a quarantine entry.
    rng = random.Random(0)
    lines = [json.dumps({**GOOD, "id": f"r{i}", "turns": ["Wie heißt das?", "Und 7 × 3?"]}).encode() for i in range(6)]
    for _ in range(300):
        raw = bytearray(b"\n".join(lines))
        for _ in range(rng.randint(1, 12)):
            at = rng.randrange(len(raw))
            action = rng.randrange(3)
            if action == 0:
                raw[at] = rng.randrange(256)
            elif action == 1:
                del raw[at : at + rng.randint(1, 9)]
            else:
                raw[at:at] = raw[at : at + rng.randint(1, 9)]
        folder = folder_of(tmp_path, bytes(raw))
        quarantine = Quarantine(None)
        try:
            records = read_mmspec(folder, quarantine)
        except InputError:
            records = []
        n_lines = sum(bool(line.strip()) for line in (folder / "mmspec.jsonl").read_bytes().split(b"\n"))
        assert len(records) + quarantine.count == n_lines


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_images_of_every_mode_come_back_in_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "image.tiff"
    Image.new(mode, (5, 4)).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp"])
def test_an_image_cut_anywhere_is_opened_or_refused_but_never_crashes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.effect_noise((64, 64), 80).convert("RGB").save(path)
    whole = path.read_bytes()
    for n in (0, 1, 8, 20, len(whole) // 2, len(whole) * 3 // 4):
        path.write_bytes(whole[:n])
        with pytest.raises(RecordError):
            open_image(path)
    rng = random.Random(1)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(8):
            damaged[rng.randrange(min(len(damaged), 400))] = rng.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            mode = open_image(path).mode
        except RecordError:
            continue
        assert mode == "RGB"


def test_what_is_no_image_file_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("this is not an image")
    with pytest.raises(RecordError, match=r"image is missing: none\.jpg"):
        open_image(tmp_path / "none.jpg")
    with pytest.raises(RecordError, match=r"not in a readable format: text\.jpg"):
        open_image(tmp_path / "text.jpg")
    with pytest.raises(RecordError, match="cannot be decoded"):
        open_image(tmp_path)
    with pytest.raises(RecordError):
        open_image(tmp_path / ("x" * 5000))
    with pytest.raises(RecordError):
        open_image(tmp_path / "nul\0.png")


def test_the_share_of_bad_records_stops_a_run_only_beyond_its_limit(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl")
    quarantine.check(0, 0.0)
    for line in range(5):
        quarantine.add("source", line, f"r{line}", "image is\nmissing")
    quarantine.check(100, 0.05)
    with pytest.raises(InputError) as caught:
        quarantine.check(99, 0.05)
    message = str(caught.value)
    for part in ("5 of 99 records", "5.1%", "allowed 5.0%", "(5x): image is missing", "q.jsonl"):
        assert part in message
    assert "\n" not in message


def test_a_fresh_quarantine_forgets_an_earlier_run_and_another_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    Quarantine(path).add("s", 1, "a", "x")
    Quarantine(path).add("s", 2, "b", "y")
    assert len(path.read_text().splitlines()) == 2
    assert Quarantine(path, fresh=True).count == 0
    assert not path.exists()
