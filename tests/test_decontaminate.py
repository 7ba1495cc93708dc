"""Decontamination: copies are found and other pictures are not, questions where they tell, and a list fits one corpus.

Set MMSPEC_TEST_DATA to a folder with `mmspec/testmini` and `owleval` to try real pictures too.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from mmspec.recipe import Data, Source
from mmspec.records import Quarantine, RecordError
from mmspec.types import InputError
from scripts import decontaminate as command
from tests.training import ROOT, TIMEOUT_S, environment, launched, save_recipe
from train import decontaminate, distill, overlap
from train.corpus import Corpus, read
from train.likeness import BITS, Gallery, PrintCache, cuts, own, squeeze
from train.overlap import ALIKE_BITS, GENERIC_PICTURES, SAME_BITS, Benchmark, search, source_id
from train.questions import MIN_WORDS, QuestionIndex, allowed, edits, occurs, words

REAL = Path(os.environ.get("MMSPEC_TEST_DATA", "nowhere"))
LONG = "How many of the striped umbrellas are leaning against the wooden fence?"


def picture(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Texture with as much in it at every scale as a photo has (1/f noise), and edges."""
    rng = np.random.default_rng(seed)
    width, height = size
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width) * width, np.fft.fftfreq(height) * height))
    spectrum = np.fft.fft2(rng.normal(size=(3, height, width))) / np.maximum(frequency, 1) ** 1.2
    pixels = np.fft.ifft2(spectrum).real
    for _ in range(6):
        x, y = rng.integers(0, width - 60), rng.integers(0, height - 60)
        pixels[:, y : y + rng.integers(20, 60), x : x + rng.integers(20, 60)] += (
            rng.normal(size=(3, 1, 1)) * pixels.std()
        )
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()) * 255
    return Image.fromarray(pixels.transpose(1, 2, 0).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **how)
    return buffer.getvalue()


def cut(image: Image.Image, left: float = 0, top: float = 0, right: float = 0, bottom: float = 0) -> Image.Image:
    w, h = image.size
    return image.crop((round(w * left), round(h * top), w - round(w * right), h - round(h * bottom)))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "encoded anew": lambda image: encoded(image, "JPEG", quality=60),
    "half the size": lambda image: encoded(image.resize((max(1, image.width // 2), max(1, image.height // 2)))),
    "5% off all sides": lambda image: encoded(cut(image, 0.05, 0.05, 0.05, 0.05)),
    "8% off the left": lambda image: encoded(cut(image, left=0.08)),
    "8% off the top": lambda image: encoded(cut(image, top=0.08)),
    "8% off the right": lambda image: encoded(cut(image, right=0.08)),
    "8% off the bottom": lambda image: encoded(cut(image, bottom=0.08)),
    "all of it": lambda image: encoded(cut(image, 0.03, 0.07, 0.09, 0.02).resize((200, 170)), "JPEG", quality=60),
}


def farthest_and_nearest(looked_for: list[Image.Image], others: list[Image.Image]) -> tuple[dict[str, int], int]:
    """Bits of the worst copy by kind, and of the nearest pair of different pictures."""
    gallery = Gallery([cuts(squeeze(encoded(image))) for image in looked_for])
    worst, nearest = dict.fromkeys(COPIES, 0), BITS
    for number, image in enumerate(looked_for):
        for kind, copied in COPIES.items():
            distances = gallery.distances(own(squeeze(copied(image))))
            worst[kind] = max(worst[kind], int(distances[number]))
            nearest = min(nearest, int(np.delete(distances, number).min()))
    for image in others:
        nearest = min(nearest, int(gallery.distances(own(squeeze(encoded(image)))).min()))
    return worst, nearest


# ---- pictures ----


def test_copies_are_near_and_other_pictures_far():
    sizes = [(320, 240), (240, 320), (500, 120), (90, 90)]
    mine = [picture(seed, sizes[seed % 4]) for seed in range(12)]
    worst, nearest = farthest_and_nearest(mine, [picture(seed, sizes[seed % 4]) for seed in range(100, 130)])
    assert max(worst.values()) <= SAME_BITS, worst
    assert nearest > ALIKE_BITS


@pytest.mark.skipif(not REAL.is_dir(), reason="MMSPEC_TEST_DATA names no folder")
def test_copies_of_real_benchmark_pictures_are_near_and_photos_far():
    mine = [Image.open(path) for path in sorted((REAL / "mmspec/testmini/images").iterdir())]
    worst, nearest = farthest_and_nearest(mine, [Image.open(path) for path in (REAL / "owleval/images").iterdir()])
    print(f"copies: {worst}; others: {nearest}")
    assert (len(mine), max(worst.values()) <= SAME_BITS) == (60, True), worst
    assert nearest > ALIKE_BITS


def test_a_benchmark_picture_that_is_the_smaller_part_is_found_too():
    for seed in range(6):
        whole = picture(seed)
        for part in (cut(whole, 0.05, 0.05, 0.05, 0.05), cut(whole, left=0.08), cut(whole, bottom=0.08)):
            gallery = Gallery([cuts(squeeze(encoded(part)))])
            assert gallery.distances(own(squeeze(encoded(whole))))[0] <= SAME_BITS


def test_proportions_and_colour_modes_do_not_count():
    gallery = Gallery([cuts(squeeze(encoded(picture(3))))])
    for other in (picture(3).resize((336, 336)), picture(3).convert("L"), picture(3).convert("CMYK")):
        assert gallery.distances(own(squeeze(encoded(other, "JPEG", quality=80))))[0] <= SAME_BITS


def test_flat_pictures_are_not_compared_and_damaged_ones_are_record_errors(tmp_path: Path):
    assert squeeze(encoded(Image.new("RGB", (50, 50), (200, 200, 200)))) is None
    for damaged in (b"", b"no picture", encoded(picture(0))[:500]):
        with pytest.raises(RecordError, match="cannot be decoded"):
            squeeze(damaged)
    assert Gallery([]).distances(own(squeeze(encoded(picture(0))))).shape == (0,)


def test_known_pictures_are_not_decoded_again_and_a_torn_record_is_forgotten(tmp_path: Path, monkeypatch):
    data = [encoded(picture(seed)) for seed in range(3)] + [encoded(Image.new("RGB", (9, 9)))]
    cache = PrintCache(tmp_path / "h")
    first = [cache.own(one) for one in data]
    cache.close()
    with (tmp_path / "h").open("ab") as file:
        file.write(b"torn")
    monkeypatch.setattr("train.likeness.squeeze", lambda data: pytest.fail("decoded again"))
    cache = PrintCache(tmp_path / "h")
    again = [cache.own(one) for one in data]
    cache.close()
    assert first[3] is None
    assert again[3] is None
    assert all(np.array_equal(a, b) for a, b in zip(first[:3], again[:3]))
    assert (tmp_path / "h").stat().st_size == 4 * (16 + first[0].nbytes)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("coco/train2017/000000033471.jpg", "coco:33471"),
        ("COCO_val2014_000000033471.jpg", "coco:33471"),
        ("gqa/images/2354786.jpg", "vg:2354786"),
        ("gqa/images/n161313.jpg", "vg:n161313"),
        ("vg/VG_100K_2/2354786.jpg", "vg:2354786"),
        ("textvqa/train_images/0054c91397f2fe05.jpg", "openimages:0054c91397f2fe05"),
        ("ocr_vqa/images/140031996X.jpg", None),
        ("mmspec_313.jpg", None),
        ("202401011230/images/7.jpg", None),
        ("0054c91397f2fe05/images/7.jpg", None),
        ("gqa/12/7.jpg", None),
        ("2354786.jpg", None),
    ],
)
def test_ids_of_the_collections_that_pictures_come_from(name: str, known: str | None):
    assert source_id(name) == known


# ---- questions ----


def test_questions_are_compared_as_words():
    assert words("<image>\nWhat's ＲＥＤ, there?") == ("what", "s", "red", "there")
    assert words("<image 1> 这是什么?") == ("这", "是", "什", "么")
    assert words("_-?!") == ()


def test_edits_are_those_of_the_best_stretch():
    def slow(question, text):
        def distance(a, b):
            if not a or not b:
                return len(a) + len(b)
            return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

        ends = range(len(text) + 1)
        return min(distance(question, text[i:j]) for i, j in itertools.product(ends, ends) if i <= j)

    rng = random.Random(0)
    for _ in range(60):
        question = tuple(rng.choice("abc") for _ in range(rng.randint(1, 4)))
        text = tuple(rng.choice("abc") for _ in range(rng.randint(0, 5)))
        assert edits(question, text) == slow(question, text)


def test_the_index_finds_every_text_that_a_question_occurs_in():
    rng = random.Random(1)
    questions = [tuple(f"w{rng.randrange(30)}" for _ in range(rng.randint(3, 40))) for _ in range(60)]
    index = QuestionIndex(questions)
    found = 0
    for _ in range(400):
        changed = list(rng.choice(questions))
        for _ in range(rng.randint(0, allowed(changed) + 1)):
            place = rng.randrange(len(changed))
            changed[place : place + rng.choice((0, 1, 1))] = ["new"] * rng.choice((0, 1))
        text = ("before", *changed, "after", "it")
        wanted = {(n, edits(q, text)) for n, q in enumerate(questions) if len(q) >= MIN_WORDS and occurs(q, text)}
        assert set(index.find(text)) == wanted
        found += len(wanted)
    assert found > 100


# ---- a search ----


def benchmark_folder(folder: Path, records: list[tuple[str, list[str]]], form: str = "{}.png") -> Path:
    """MMSpec's layout: record k has picture(k) under the name that is given."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for number, (name, turns) in enumerate(records):
        picture(number).save(folder / "images" / name)
        lines.append(json.dumps({"id": f"b{number}", "image": name, "turns": turns, "category": "c", "topic": "t"}))
    (folder / "mmspec.jsonl").write_text("\n".join(lines))
    return folder


def training_set(
    folder: Path, samples: list[tuple[bytes | None, list[str]]], names: dict[int, str] | None = None
) -> Path:
    """LLaVA JSON with a picture a sample, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (data, turns) in enumerate(samples):
        said = []
        for place, turn in enumerate(turns):
            mark = "<image>\n" if place == 0 and data is not None else ""
            said += [{"from": "human", "value": mark + turn}, {"from": "gpt", "value": f"Answer {number}."}]
        record: dict[str, Any] = {"id": f"s{number}", "conversations": said}
        if data is not None:
            record["image"] = (names or {}).get(number, f"{number}.jpg")
            (folder / record["image"]).parent.mkdir(parents=True, exist_ok=True)
            (folder / record["image"]).write_bytes(data)
        records.append(record)
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def compared(tmp_path: Path, corpus: Corpus, benchmark: Benchmark, threads: int = 2) -> decontaminate.Listing:
    cache = PrintCache(tmp_path / "hashes")
    try:
        return search(corpus, benchmark, cache, threads, quiet=True)
    finally:
        cache.close()


def read_all(path: Path) -> Corpus:
    return read([Source(str(path))], Quarantine(None))


def test_each_rule_finds_what_it_is_for_and_nothing_else(tmp_path: Path):
    short, twice = "What colour is it?", "Describe what you can see in this picture please now."
    bench = benchmark_folder(
        tmp_path / "b",
        [
            ("one.png", [short]),
            ("COCO_val2014_000000000777.png", ["Describe the image."]),
            ("three.png", ["Describe the image.", LONG]),
            ("four.png", [twice]),
            ("five.png", [twice]),
        ],
    )
    others = [encoded(picture(50 + n), "JPEG", quality=80) for n in range(9)]
    samples = [
        (encoded(cut(picture(0), right=0.08), "JPEG", quality=60), ["Anything?"]),
        (others[1], ["Anything?"]),
        (others[2], ["One thing.", f"{LONG}\nAnswer the question using a single word or phrase."]),
        (others[3], [LONG.replace("wooden", "iron")]),
        (None, [LONG]),
        (others[4], ["How many of the plain umbrellas are lying in front of the iron fence?"]),
        (others[5], [short]),
        (others[6], ["Describe the image."]),
        (others[7], [twice]),
        (b"no picture", ["Anything?"]),
        (encoded(Image.new("RGB", (40, 40))), ["Anything?"]),
    ]
    path = training_set(tmp_path / "t", samples, {1: "coco/train2017/000000000777.jpg"})
    listing = compared(tmp_path, read_all(path), Benchmark(str(bench)))
    found = [(e.index, e.id, e.line, e.rule, e.of, e.words) for e in listing.removed]
    assert found == [
        (0, "s0", 1, "picture", "b0", None),
        (1, "s1", 2, "source id", "b1", None),
        (2, "s2", 3, "question", "b2", 0),
        (3, "s3", 4, "question", "b2", 1),
        (4, "s4", 5, "question", "b2", 0),
    ]
    assert listing.removed[0].bits <= SAME_BITS
    assert (listing.n_unreadable, listing.n_flat) == (1, 1)
    assert listing.counts() == {str(path): {"picture": 1, "source id": 1, "question": 3}}
    given = ["vg/VG_100K/12.jpg", "coco:000000000005", "", " VG:n7 ", "openimages:0054C91397F2FE05"]
    alone = Benchmark(str(bench), ids=given)
    assert set(alone.ids) == {"vg:12", "coco:5", "vg:n7", "openimages:0054c91397f2fe05", "coco:777"}
    with pytest.raises(InputError, match=r"--ids, line 2: '2354786.jpg' names no picture; give coco:NUMBER"):
        Benchmark(str(bench), ids=["vg:1", "2354786.jpg"])


def embedded_set(path: Path, names: list[str | None], seed: int) -> Path:
    """A Parquet file whose records ask LONG, each of a picture of its own that it holds as bytes."""
    records = [
        {
            "messages": [{"role": "user", "content": LONG}],
            "images": [{"bytes": encoded(picture(seed + n, (80, 80))), "path": name}],
        }
        for n, name in enumerate(names)
    ]
    datasets.Dataset.from_list(records).to_parquet(path)
    return path


def test_pictures_as_bytes_have_the_id_of_their_path_and_are_one_in_their_source_alone(tmp_path: Path):
    bench = Benchmark(str(benchmark_folder(tmp_path / "b", [("one.png", [LONG])])), ids=["vg:2354786"])
    known = embedded_set(tmp_path / "known.parquet", ["gqa/images/2354786.jpg"], 50)
    assert [entry.rule for entry in compared(tmp_path, read_all(known), bench).removed] == ["source id"]
    # Lines have the same numbers in both: ten pictures, and one more.
    files = [embedded_set(tmp_path / f"{n}.parquet", [None] * k, 60 + 10 * n) for n, k in enumerate((5, 5, 1))]
    ten, eleven = (read([Source(str(file)) for file in some], Quarantine(None)) for some in (files[:2], files))
    assert len(compared(tmp_path, ten, bench).removed) == GENERIC_PICTURES == 10
    assert len(compared(tmp_path, eleven, bench).removed) == 0


def test_a_short_question_counts_with_a_picture_that_looks_alike(tmp_path: Path, monkeypatch):
    bench = benchmark_folder(tmp_path / "b", [("one.png", ["What colour is it?"])])
    near = encoded(cut(picture(0), 0.16, 0, 0, 0.02))
    path = training_set(tmp_path / "t", [(near, ["What colour is it, then?"]), (near, ["Who is it?"])])
    benchmark = Benchmark(str(bench))
    bits = int(benchmark.gallery.distances(own(squeeze(near)))[0])
    assert SAME_BITS < bits <= ALIKE_BITS, "the case is what it is meant to be"
    found = compared(tmp_path, read_all(path), benchmark).removed
    assert [(e.index, e.rule, e.bits) for e in found] == [(0, "picture and question", bits)]


def test_a_question_that_the_corpus_asks_of_many_pictures_belongs_to_none(tmp_path: Path):
    bench = Benchmark(str(benchmark_folder(tmp_path / "b", [("one.png", [LONG])])))
    pictures = [encoded(picture(50 + n, (80, 80))) for n in range(GENERIC_PICTURES + 1)]
    many = training_set(tmp_path / "many", [(one, [LONG]) for one in pictures])
    few = training_set(tmp_path / "few", [(one, [LONG]) for one in pictures[:-1]])
    texts = training_set(tmp_path / "texts", [(None, [LONG])] * 30)
    assert len(compared(tmp_path, read_all(many), bench).removed) == 0
    assert len(compared(tmp_path, read_all(few), bench).removed) == GENERIC_PICTURES
    assert len(compared(tmp_path, read_all(texts), bench).removed) == 30, "copies of a text are no sign of a template"


def test_threads_and_a_cache_change_nothing(tmp_path: Path):
    bench = Benchmark(str(benchmark_folder(tmp_path / "b", [(f"{n}.png", ["Q?"]) for n in range(3)])))
    path = training_set(tmp_path / "t", [(encoded(picture(n % 6), "JPEG"), ["Q?"]) for n in range(40)])
    first = compared(tmp_path, read_all(path), bench, threads=1)
    assert [e.index for e in first.removed] == [n for n in range(40) if n % 6 < 3]
    assert compared(tmp_path, read_all(path), bench, threads=4) == first


# ---- lists ----


def two_copies(tmp_path: Path) -> tuple[Path, Path]:
    """A benchmark, and a training set of which samples 1 and 3 of five are copies."""
    bench = benchmark_folder(tmp_path / "b", [("1.png", ["Q?"]), ("3.png", ["Q?"])])
    copies = {1: picture(0), 3: picture(1)}
    return bench, training_set(
        tmp_path / "t", [(encoded(copies.get(n, picture(60 + n)), "JPEG"), ["Q?"]) for n in range(5)]
    )


def test_the_command_makes_the_list_that_training_applies(tmp_path: Path, capsys):
    bench, data = two_copies(tmp_path)
    recipe = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    out = tmp_path / "deep" / "list.json"
    assert command.main([str(recipe), f"data.decontaminated={out}", "--benchmark", str(bench)]) == 0
    said = capsys.readouterr().out
    assert "2 of 5 samples are in" in said
    assert f"{data}: 2 by picture" in said
    corpus = read_all(data)
    clean = decontaminate.apply(corpus, out)
    assert [sample.id for sample in clean.samples] == ["s0", "s2", "s4"]
    assert len(clean.weights) == 3
    assert clean.removed == {"picture": 2}
    assert clean.digest not in (corpus.digest, "")
    assert decontaminate.load(out).counts() == json.loads(out.read_text())["counts"]


def test_a_list_that_names_nothing_changes_nothing(tmp_path: Path):
    _, data = two_copies(tmp_path)
    corpus = read_all(data)
    bench = Benchmark(str(benchmark_folder(tmp_path / "none", [("y.png", ["Z?"])])))
    listing = decontaminate.Listing(corpus.digest, 5, bench.name, bench.digest, overlap.RULES, [])
    decontaminate.save(tmp_path / "l.json", listing)
    assert decontaminate.apply(corpus, tmp_path / "l.json") is corpus


def test_a_list_of_other_data_is_refused_with_the_command_that_makes_a_new_one(tmp_path: Path, monkeypatch):
    bench, data = two_copies(tmp_path)
    out = tmp_path / "list.json"
    decontaminate.save(out, compared(tmp_path, read_all(data), Benchmark(str(bench))))
    records = json.loads(data.read_text())
    data.write_text(json.dumps(records[:4]))
    monkeypatch.setattr(sys, "argv", ["train/distill.py", "r.yaml", "data.train=x y.json", "optim.lr=1", "--dry-run"])
    with pytest.raises(InputError) as error:
        decontaminate.apply(read_all(data), out)
    assert f"`python scripts/decontaminate.py r.yaml 'data.train=x y.json' --benchmark {bench}`" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: "[1]",
        lambda entries: json.dumps(entries)[:50],
        lambda entries: json.dumps({**entries, "version": 99}),
        lambda entries: json.dumps({k: v for k, v in entries.items() if k != "removed"}),
        lambda entries: json.dumps({**entries, "removed": [{"index": 1}]}),
        lambda entries: json.dumps({**entries, "removed": [{**entries["removed"][0], "index": 77}]}),
    ],
)
def test_a_damaged_list_is_refused_in_one_line(tmp_path: Path, damage):
    bench, data = two_copies(tmp_path)
    out = tmp_path / "list.json"
    decontaminate.save(out, compared(tmp_path, read_all(data), Benchmark(str(bench))))
    out.write_text(damage(json.loads(out.read_text())))
    with pytest.raises(InputError, match=r"cannot be read .*make it again with"):
        decontaminate.load(out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--benchmark", "nowhere"], "data folder not found: nowhere"),
        (["--benchmark", "synth:tset"], "unknown split"),
        ([], "--benchmark"),
        (["--benchmark", "{b}", "--ids", "no.txt"], "--ids no.txt cannot be read"),
        (["--benchmark", "{b}", "--threads", "-1"], "--threads must be at least 1"),
        (["--benchmark", "{b}", "data.decontaminated=null"], "--out FILE"),
        (["--benchmark", "{b}", "--out", "{b}/mmspec.jsonl/list.json"], "cannot be written"),
    ],
)
def test_wrong_input_of_the_command_is_one_line_and_code_2(tmp_path: Path, capsys, words, said):
    bench, data = two_copies(tmp_path)
    recipe = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    arguments = [str(recipe), f"data.decontaminated={tmp_path}/l.json", *(word.format(b=bench) for word in words)]
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_benchmark_without_its_pictures_is_refused(tmp_path: Path):
    bench = benchmark_folder(tmp_path / "b", [("1.png", ["Q?"])])
    (bench / "images" / "1.png").write_bytes(b"damaged")
    with pytest.raises(InputError, match="none of its pictures can be read"):
        Benchmark(str(bench))


def test_training_does_not_start_without_the_list_that_its_recipe_names(tmp_path: Path, capsys, monkeypatch):
    _, data = two_copies(tmp_path)
    recipe = str(save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs"))
    words = [recipe, f"data.decontaminated={tmp_path / 'list.json'}"]
    monkeypatch.setattr(sys, "argv", ["train/distill.py", *words])
    assert distill.main(words) == 2
    error = capsys.readouterr().err
    assert f"python scripts/decontaminate.py {recipe} {words[1]} --benchmark FOLDER" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
    assert distill.main([*words, "--dry-run"]) == 0, "planning needs no list"


def test_a_run_answers_what_the_list_leaves_and_says_what_it_does_not(tmp_path: Path):
    bench, data = two_copies(tmp_path)
    records = json.loads(data.read_text())
    data.write_text(json.dumps([*records, {"id": "bad", "conversations": []}]))
    recipe = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    out = tmp_path / "list.json"
    assert command.main([str(recipe), "--out", str(out), "--benchmark", str(bench)]) == 0
    words = [recipe, f"data.decontaminated={out}", "data.max_bad_share=0.5", "data.answers=given"]
    done = subprocess.run(
        launched(0, ROOT / "scripts" / "regenerate.py", *words),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = tmp_path / "runs" / "t" / "quarantine.jsonl"
    rest = f"2 left out by {out} (2x picture), 1 quarantined (1x empty conversation), listed in {listed}"
    assert f"read: 3 of 6 records, {rest}" in done.stdout
    assert f"data: 3 of 6 records used, {rest}" in done.stdout
    (answers,) = (tmp_path / "runs" / "t" / "answers").glob("*/answers.jsonl")
    assert [json.loads(line)["id"] for line in answers.read_text().splitlines()] == ["s0", "s2", "s4"]


def test_too_many_bad_records_end_a_run_before_anything_is_loaded(tmp_path: Path):
    _, data = two_copies(tmp_path)
    data.write_text(json.dumps([*json.loads(data.read_text()), 7, {"id": "bad", "conversations": []}, 8]))
    quarantine = Quarantine(tmp_path / "q.jsonl")
    with pytest.raises(InputError, match=r"3 of 8 records are unusable \(37.5%, allowed 30.0%\), most often \(2x\)"):
        decontaminate.read_clean(Data([Source(str(data))], max_bad_share=0.3), quarantine)
    assert len((tmp_path / "q.jsonl").read_text().splitlines()) == 3
    assert len(decontaminate.read_clean(Data([Source(str(data))], max_bad_share=0.4), Quarantine(None))) == 5
