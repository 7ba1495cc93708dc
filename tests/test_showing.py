"""The page of training samples: what it colours is learned, nothing leaves it, and nothing in the data breaks it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmspec.recipe import load
from mmspec.targets import load_target
from scripts import inspect_data
from tests import tiny
from tests.training import record, save_data, save_recipe
from train import decontaminate, showing
from train.answers import BAD, GOOD, Dialogue, Part
from train.encode import encode, length_limit
from train.regenerate import answers_folder
from train.showing import BINS, Inspected, draw, figures, histogram, pieces, provenance, spelled

VOID = ("meta", "img")
NASTY = "<script>alert('x')</script> \"quoted\" & <b>"


class Page(HTMLParser):
    """Tags that do not close, and everything that would leave the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [f"{k}={v}" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")]
        self.outside += [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def learned_text(page: str) -> str:
    """What the page colours as learned."""
    return html.unescape("".join(re.findall(r'<span class="a[^"]*" title="\d+">([^<]*)</span>', page)))


@pytest.fixture(scope="module")
def target() -> Any:
    return load_target("tiny_llava")


def inspected(tmp_path: Path, records: list[Any], *overrides: str) -> Inspected:
    data = save_data(tmp_path, records)
    path = save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs")
    return inspect_data.inspect(load(path, overrides))


def answer(tmp_path: Path, found: Inspected, known: dict[int, Dialogue | str]) -> None:
    """Puts answers where regeneration would have put them."""
    folder = answers_folder(found.recipe, found.corpus, found.target)
    folder.mkdir(parents=True)
    with Part(folder, 0) as part:
        for index, result in known.items():
            part.write(index, f"r{index}", result)


def test_what_is_coloured_is_what_is_learned(tmp_path: Path, target: Any):
    found = inspected(tmp_path, [record(n, turns=1 + n % 3) for n in range(6)], "data.answers=given")
    for sample in found.corpus.samples:
        dialogue = Dialogue(sample.answers, (True,) * len(sample.answers), 0)
        prompt, marks = encode(sample, dialogue, target, length_limit(found.recipe.data, target))
        tokens = pieces(target, prompt, marks)
        stops = [piece for piece in tokens if piece["kind"] == "answer" and piece["id"] in target.stop_ids]
        assert len(stops) == len(sample.answers), "each stop token is learned"
        said = "".join(piece["text"] for piece in tokens if piece["kind"] == "answer" and not piece["special"])
        assert said.split() == " ".join(sample.answers).split()
        pictures = [piece for piece in tokens if piece["kind"] == "image"]
        assert [piece["n"] for piece in pictures] == [int(prompt.visual.sum())]
        assert sum(piece["n"] for piece in tokens) == len(prompt)


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path: Path):
    found = inspected(tmp_path, [record(n) for n in range(5)], "data.answers=given")
    page = showing.render(found, 3)
    parsed = Page(page)
    assert (parsed.open, parsed.outside) == ([], [])
    assert parsed.tags.count("article") == 3
    assert parsed.tags.count("img") == 3
    assert "script" not in parsed.tags
    assert not re.search(r"https?:|url\(|@import", re.sub(r"data:[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_whatever_the_data_say_is_escaped(tmp_path: Path):
    bad = record(0)
    bad |= {"id": NASTY, "topic": NASTY}
    bad["conversations"][0]["value"] = f"<image>\n{NASTY}"
    bad["conversations"][1]["value"] = f"{NASTY}\x00\x1b"
    found = inspected(tmp_path, [bad, {**record(1), "id": "\ud800"}], "data.answers=given")
    found.notes.append(NASTY)
    showing.write(tmp_path / "p.html", found, 5)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert Page(page).tags.count("b") == 0
    assert "<script" not in page
    assert "\x00" not in page
    assert NASTY in learned_text(page)


def test_prompts_are_shown_until_there_are_answers_and_then_these(tmp_path: Path):
    found = inspected(tmp_path, [record(n) for n in range(4)])
    page = showing.render(found, 4)
    assert learned_text(page) == ""
    assert page.count("not answered yet") == 4
    assert any("0 of 4 samples have their answers" in note for note in found.notes)
    answer(
        tmp_path,
        found,
        {0: Dialogue(("A red circle.",), (True,), 9), 1: "broken: really", 3: Dialogue(("A blue star",), (False,), 9)},
    )
    again = inspect_data.inspect(found.recipe)
    assert draw(again, 9) == [0, 3]
    page = showing.render(again, 9)
    assert "A red circle.</s>" in learned_text(page)
    assert "cut at the limit" in page
    assert provenance(again)["single answers"] == {"ended in a stop token": 1, "cut at its limit": 1}
    assert provenance(again)["conversations"] == {"the target's own, greedy": 2}
    assert "<td>broken</td>" in page


def test_the_figures_account_for_every_record(tmp_path: Path):
    wrong: list[Any] = [{"id": "x", "conversations": []}, 7]
    found = inspected(tmp_path, [*(record(n) for n in range(8)), *wrong])
    listing = decontaminate.Listing(
        found.corpus.digest,
        8,
        "b",
        "d",
        {"picture": "words"},
        [decontaminate.Removed(2, "s", 3, "r2", "picture", "b7", 9)],
    )
    decontaminate.save(tmp_path / "l.json", listing)
    found = inspect_data.inspect(load(tmp_path / "r.yaml", [f"data.decontaminated={tmp_path / 'l.json'}"]))
    answer(tmp_path, found, {0: "bad", 1: "degenerate answer, it is empty", 2: Dialogue(("A",), (True,), 45)})
    found = inspect_data.inspect(found.recipe)
    total, *parts = [n for _, n, _ in figures(found)]
    assert (total, parts) == (10, [5, 3, 1, 1])
    assert sum(parts) == total
    page = showing.render(found, 4)
    assert "1 of 8 samples are left out" in page
    assert "r2 · picture · b7 · 9 bits" in page
    assert "degenerate answer, it is empty" in page
    found.reasons = {"bad": 2}
    assert '<td class="n">3</td><td>bad</td>' in showing.render(found, 1), "of reading and of answering"


def test_a_list_that_does_not_fit_is_a_note_of_the_page(tmp_path: Path):
    found = inspected(tmp_path, [record(0)], "data.decontaminated=nowhere.json")
    assert "nowhere.json does not exist" in found.notes[0]
    assert "nowhere.json does not exist" in showing.render(found, 1)


def test_pictures_that_cannot_be_read_and_prompts_that_are_too_long_say_so(tmp_path: Path):
    found = inspected(tmp_path, [record(0), record(1)], "data.answers=given", "data.max_length=20")
    (tmp_path / "images" / "1.png").write_bytes(b"damaged")
    page = showing.render(found, 2)
    assert "1.png cannot be read" in page
    assert page.count('<p class="bad">') == 2


@pytest.mark.parametrize("text", ["", "plain words", "naïve café — “quoted” 你好 🙂 done", "a\nb\t\tc"])
def test_tokens_spell_the_text_they_stand_for(target: Any, text: str):
    tokenizer = target.processor.tokenizer
    ids = tokenizer(text)["input_ids"]
    whole = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert "".join(spelled(tokenizer, ids)) == whole
    words = tiny.processor().tokenizer
    ids = words("w1 w2 </s> w3")["input_ids"]
    assert "".join(spelled(words, ids)).split() == ["w1", "w2", "</s>", "w3"]


@pytest.mark.parametrize("lengths", [[1], [0], [5] * 9, list(range(1000)), [3, 4096]])
def test_a_histogram_counts_everything_once(lengths: list[int]):
    found = histogram(lengths)
    assert found is not None
    assert len(found["bars"]) == BINS
    assert sum(bar[2] for bar in found["bars"]) == len(lengths)
    assert max(bar[3] for bar in found["bars"]) == 100
    for low, high, n, _ in found["bars"]:
        assert n == sum(low <= length <= high for length in lengths)
    assert histogram([]) is None


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path):
    found = inspected(tmp_path, [record(n) for n in range(30)])
    other = inspect_data.inspect(load(tmp_path / "r.yaml", ["run.seed=1"]))
    assert draw(found, 5) == draw(found, 5) != draw(other, 5)
    assert draw(found, 99) == list(range(30))
    found.prepared.status[:] = np.where(np.arange(30) % 2, GOOD, BAD)
    assert all(index % 2 for index in draw(found, 5))


def test_the_command_writes_the_page_and_wrong_input_is_one_line(tmp_path: Path, capsys):
    data = save_data(tmp_path, [record(0)])
    path = str(save_recipe(tmp_path / "r.yaml", "tiny_llava", data, tmp_path / "runs"))
    assert inspect_data.main([path, "data.answers=given", "--samples", "1"]) == 0
    assert (tmp_path / "runs" / "t" / "data.html").is_file()
    assert "data: 1 records, 1 usable" in capsys.readouterr().out
    for words in (["--samples", "-1"], ["data.train=nowhere"], ["target.name=nowhere"], ["--out", f"{path}/p.html"]):
        assert inspect_data.main([path, *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert json.loads(data.read_text())[0]["id"] == "r0"
