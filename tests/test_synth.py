"""The corpus: the same everywhere, disjoint between splits, in MMSpec's schema, and checkable."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from mmspec.synth import SPLITS, TOPICS, Fact, check, materialise, sample, scene_of

MMSPEC_CATEGORIES = {
    "general vqa": {"default"},
    "text vqa": {"text reading"},
    "image captioning": {"image captioning"},
    "chart understanding": {"chart reasoning"},
}


def test_a_sample_is_a_pure_function_of_split_and_index() -> None:
    one, two = sample("train", 123), sample("train", 123)
    assert one.image.tobytes() == two.image.tobytes()
    assert (one.turns, one.answers, one.facts) == (two.turns, two.answers, two.facts)
    assert sample("train", 124).turns != one.turns or sample("train", 124).image.tobytes() != one.image.tobytes()


def test_samples_do_not_depend_on_the_hash_seed() -> None:
    """A set or a dict keyed by hash inside the generator would show here."""
    code = "from mmspec.synth import sample; print([sample('val', i).answers for i in range(24)])"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]
    assert runs[0].strip() == str([sample("val", i).answers for i in range(24)])


def test_no_scene_with_its_question_occurs_in_two_splits() -> None:
    """By construction scenes themselves are disjoint; small charts would collide by chance otherwise."""
    scenes: dict[str, set[str]] = {}
    for split, number in (("train", 2000), ("val", SPLITS["val"]), ("test", SPLITS["test"])):
        scenes[split] = {scene_of(split, i).key() for i in range(number)}
    assert not scenes["train"] & scenes["test"]
    assert not scenes["train"] & scenes["val"]
    assert not scenes["val"] & scenes["test"]


def test_splits_hold_the_topics_in_equal_parts() -> None:
    """val's 200 are not divisible by six, so there the parts differ by one."""
    assert set(Counter(sample("test", i).topic for i in range(600)).values()) == {100}
    assert set(Counter(sample("testmini", i).topic for i in range(60)).values()) == {10}
    val = Counter(sample("val", i).topic for i in range(200))
    assert set(val) == set(TOPICS)
    assert max(val.values()) - min(val.values()) == 1


def test_testmini_is_a_subset_of_test() -> None:
    test = {sample("test", i).id: sample("test", i) for i in range(600)}
    assert len(test) == 600
    for i in range(60):
        mini = sample("testmini", i)
        assert mini.turns == test[mini.id].turns
        assert mini.image.tobytes() == test[mini.id].image.tobytes()


def test_categories_are_mmspecs() -> None:
    for i in range(600):
        one = sample("test", i)
        assert one.category in MMSPEC_CATEGORIES.get(one.topic, {one.category})


def test_multi_turn_records_have_one_to_three_turns() -> None:
    """Three in ten of MMSpec's multi-turn records have a single turn; 100 draws stay within 15 to 45 of that."""
    turns = Counter(len(sample("test", i).turns) for i in range(500, 600))
    assert set(turns) == {1, 2, 3}
    assert 15 <= turns[1] <= 45
    assert all(len(sample("test", i).turns) == 1 for i in range(500))


def test_answer_lengths_are_in_mmspecs_proportions() -> None:
    """MMSpec's means are 47/63/192/69/286/748 tokens; ours a quarter of that, in words here, within a factor of 1.5."""
    words: dict[str, list[int]] = defaultdict(list)
    for i in range(600):
        one = sample("test", i)
        words[one.topic].append(sum(len(answer.split()) for answer in one.answers))
    expected = dict(zip(TOPICS, (47, 63, 192, 69, 286, 748), strict=True))
    for topic, values in words.items():
        mean = sum(values) / len(values)
        wanted = expected[topic] / 4 * 0.8  # about five words make six tokens
        assert wanted / 1.5 < mean < wanted * 1.5, topic


def test_wording_varies() -> None:
    """Without free choices a draft head would learn the answers by heart."""
    questions = {sample("test", i).turns[0] for i in range(200, 300)}
    openings = {" ".join(sample("test", i).answers[0].split()[:3]) for i in range(200, 300)}
    assert len(questions) >= 8
    assert len(openings) >= 6


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_reference_answers_hold_their_facts(split: str) -> None:
    for i in range(200):
        one = sample(split, i)
        assert one.facts
        for fact in one.facts:
            assert check(fact, one.answers[fact.turn]), (one.id, fact)


@pytest.mark.parametrize(
    ("fact", "right", "wrong"),
    [
        (Fact(0, "colour", "red"), "It is RED.", "It is reddish."),
        (Fact(0, "shape", "red star"), "There is a red star here.", "There is a star on red ground."),
        (Fact(0, "position", "top left"), "In the top left.", "At the top, not on the left."),
        (Fact(0, "count", "three"), "I count 3 of them.", "I count 13 of them."),
        (Fact(0, "count", "3"), "There are three stars.", "There are four stars."),
        (Fact(0, "word", "OPEN"), 'It says "open".', "It says opened."),
        (Fact(0, "bar", "7"), "The red bar is at 7.", "The red bar is at 17."),
        (Fact(0, "bar", "red 7"), "The red bar reaches 7 here.", "The red bar is taller than blue, at 7."),
        (Fact(0, "count", "(B)"), "Not (A). The answer is (B) 4.", "Is it (B)? The answer is (C) 5."),
        (Fact(0, "count", "(B)"), "So (b).", "So B."),
    ],
)
def test_check_tells_right_from_wrong(fact: Fact, right: str, wrong: str) -> None:
    assert check(fact, right)
    assert not check(fact, wrong)


def test_unknown_split_and_index_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        sample("tset", 0)
    with pytest.raises(IndexError, match="60 samples"):
        sample("testmini", 60)
    with pytest.raises(ValueError, match="limit is 0"):
        materialise("val", limit=0)


def test_materialised_records_have_mmspecs_schema(tmp_path: Path) -> None:
    folder = materialise("testmini", root=tmp_path)
    records = [json.loads(line) for line in (folder / "mmspec.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 60
    for i, record in enumerate(records):
        assert list(record) == ["id", "image", "turns", "category", "topic"]
        assert record["turns"] == list(sample("testmini", i).turns)
        assert (folder / "images" / record["image"]).is_file()
    llava = json.loads((folder / "llava.json").read_text(encoding="utf-8"))
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    for record, conversation in zip(records, llava, strict=True):
        assert list(conversation) == ["id", "image", "conversations", "topic"]
        values = conversation["conversations"]
        assert [v["from"] for v in values] == ["human", "gpt"] * len(record["turns"])
        assert values[0]["value"] == "<image>\n" + record["turns"][0]
        assert [v["value"] for v in values[2::2]] == record["turns"][1:]
        assert facts[record["id"]]


def test_materialise_writes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMSPEC_CACHE", str(tmp_path))
    first = materialise("val", limit=5)
    stamp = (first / "mmspec.jsonl").stat().st_mtime_ns
    assert materialise("val", limit=5) == first
    assert (first / "mmspec.jsonl").stat().st_mtime_ns == stamp
    assert materialise("val", limit=6) != first
    assert {path.name for path in tmp_path.iterdir()} == {first.name, materialise("val", limit=6).name}


def test_an_interrupted_materialise_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(split: str, index: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mmspec.synth.store.sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            materialise("val", limit=5, root=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(list((materialise("val", limit=5, root=tmp_path) / "images").iterdir())) == 5
