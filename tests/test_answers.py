"""Answers: one file whoever made it and however it was torn, degenerate ones dropped, and the same with any drafter."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmspec.checkpoint import DraftTree
from mmspec.policy import FixedPolicy
from mmspec.recipe import load
from mmspec.records import Quarantine
from mmspec.types import InputError, Output
from tests import tiny
from tests.training import ROOT, prepare, record, session
from train import regenerate
from train.answers import DEGENERATE, FINAL, MANIFEST, Dialogue, Part, Prepared, merge, read, tidy
from train.asking import answer_limit, instruction_of, is_sampled
from train.degenerate import fault, loop
from train.drafting import Drafting, drafting
from train.sample import Picture
from train.session import Session
from train.sooner import compare, n_equal

# ---- the store ----

RESULTS: list[Dialogue | str] = [
    Dialogue(("w1 é w2", "für"), (True, False), 31),
    "image is missing: 1.png",
    Dialogue(("日本語 ok",), (True,), 12),
    "degenerate answer, it is empty",
    Dialogue(('says "x"\nand y',), (False,), 70),
]


def written(folder: Path, ranks: list[int]) -> Prepared:
    """RESULTS in parts: sample k was answered by process `ranks[k]`, later samples first."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in reversed(range(len(RESULTS))):
        with Part(folder, ranks[k]) as part:
            part.write(k, f"r{k}", RESULTS[k])
    return read(folder, len(RESULTS))


def test_what_was_written_is_read(tmp_path: Path):
    known = written(tmp_path, [0, 1, 0, 1, 2])
    assert known.complete
    assert known.usable == [0, 2, 4]
    assert dict(known.dialogues) == {k: RESULTS[k] for k in (0, 2, 4)}
    assert dict(known.bad) == {k: RESULTS[k] for k in (1, 3)}
    assert known.lengths.tolist() == [31, 0, 12, 0, 70]
    assert known.reasons() == {"image is missing": 1, "degenerate answer, it is empty": 1}
    assert known.reasons(DEGENERATE) == {"degenerate answer, it is empty": 1}
    assert 1 not in known.dialogues
    with pytest.raises(KeyError):
        known.dialogues[3]


def test_the_final_file_does_not_tell_who_wrote_which_part(tmp_path: Path):
    files = []
    for name, ranks in (("a", [0] * 5), ("b", [0, 1, 2, 3, 4]), ("c", [1, 0, 1, 0, 1])):
        known = written(tmp_path / name, ranks)
        with Part(tmp_path / name, 7) as part:  # answered twice
            part.write(2, "r2", RESULTS[2])
        merge(tmp_path / name, known)
        files.append((tmp_path / name / FINAL).read_bytes())
    assert files[0] == files[1] == files[2]
    entries = [json.loads(line) for line in files[0].splitlines()]
    assert [entry["index"] for entry in entries] == [0, 1, 2, 3, 4]
    assert [entry["id"] for entry in entries] == [f"r{k}" for k in range(5)]


def test_a_part_that_was_torn_anywhere_loses_the_torn_line_alone(tmp_path: Path):
    """At every byte, in the middle of a character too; then another process goes on with it."""
    written(tmp_path, [0] * 5)
    path = tmp_path / "part-0.jsonl"
    whole = path.read_bytes()
    merge(tmp_path, read(tmp_path, 5))
    final = (tmp_path / FINAL).read_bytes()
    (tmp_path / FINAL).unlink()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        known = read(tmp_path, 5)
        n_whole = sum(end <= cut + 1 for end in ends)  # a line that lacks its end alone is whole
        assert len(known.dialogues) + len(known.bad) == n_whole
        missing = [k for k in range(5) if k not in known.dialogues and k not in known.bad]
        with Part(tmp_path, 0) as part:
            for k in missing:
                part.write(k, f"r{k}", RESULTS[k])
        assert path.read_bytes().startswith(whole[:cut])
        known = read(tmp_path, 5)
        assert known.complete
        merge(tmp_path, known)
        assert (tmp_path / FINAL).read_bytes() == final
        (tmp_path / FINAL).unlink()


def test_killed_while_merging_nothing_is_lost_and_nothing_stays_behind(tmp_path: Path):
    known = written(tmp_path, [0, 1, 0, 1, 0])
    (tmp_path / f"{FINAL}.123.tmp").write_bytes(known.line(0)[:9])  # before the file was renamed
    assert read(tmp_path, 5).complete
    tidy(tmp_path)
    assert list(tmp_path.glob("part-*.jsonl"))
    merge(tmp_path, known)
    (tmp_path / "part-1.jsonl").write_text("torn")  # before the parts were removed
    assert dict(read(tmp_path, 5).dialogues) == {k: RESULTS[k] for k in (0, 2, 4)}
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FINAL]


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path):
    good = json.dumps({"index": 1, "id": "x", "answers": ["a"], "finished": [True], "length": 4})
    lines = ["", "null", "[]", "{}", '{"index": null}', '{"index": 9, "bad": "x"}', '{"index": -1, "bad": "x"}', good]
    (tmp_path / "part-0.jsonl").write_text("\n".join(lines) + "\n")
    known = read(tmp_path, 2)
    assert known.usable == [1]
    assert not known.complete


def test_the_digest_is_of_answers_and_lengths(tmp_path: Path):
    known = written(tmp_path / "a", [0] * 5)
    assert known.digest == written(tmp_path / "b", [4, 3, 2, 1, 0]).digest
    other = tmp_path / "c"
    other.mkdir()
    with Part(other, 0) as part:
        for k, result in enumerate(RESULTS):
            part.write(k, "", replace(result, length=32) if isinstance(result, Dialogue) and k == 0 else result)
    assert read(other, 5).digest != known.digest


@pytest.mark.slow
def test_a_hundred_thousand_answers_take_a_few_bytes_each(tmp_path: Path):
    n, entry = 100_000, {"answers": ["many words " * 40], "finished": [True], "length": 9}
    with (tmp_path / FINAL).open("w") as file:
        for k in range(n):
            file.write(json.dumps({"index": k, "id": str(k), **entry}) + "\n")
    assert (tmp_path / FINAL).stat().st_size > 45e6
    tracemalloc.start()
    known = read(tmp_path, n)
    assert len(known.dialogues) == n
    assert known.dialogues[n - 1].answers == ("many words " * 40,)
    assert known.digest
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * n  # a list of their places, while all are visited, takes more than what is kept


# ---- degenerate answers ----


@pytest.mark.parametrize(
    ("tokens", "block"),
    [
        ([5] * 32, 1),
        ([5] * 31, 0),
        ([9, 8, 7] + [1, 2, 3, 4] * 8, 4),
        ([1, 2, 3, 4] * 8 + [9], 0),  # it got out of it
        ([9] + [1, 2, 3] * 10 + [1, 2], 3),  # the last round is not whole
        (list(range(30)) * 4, 30),
        (list(range(30)) * 3, 0),
        (list(range(40)) * 4, 0),
        (list(range(200)), 0),
        ([], 0),
    ],
)
def test_an_answer_that_ends_in_a_loop_is_told(tokens: list[int], block: int):
    assert loop(tokens) == block


@given(
    st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 12)
)
def test_loops_against_a_search_by_hand(before: list[int], block: list[int], times: int):
    tokens = before + block * times
    periods = [
        p
        for p in range(1, 33)
        if len(tokens) >= max(32, 4 * p) and all(tokens[-i] == tokens[-i - p] for i in range(1, max(32, 4 * p) - p + 1))
    ]
    assert loop(tokens) == (min(periods) if periods else 0)


def test_each_rule_drops_what_it_names_and_only_that():
    target = tiny.llava()
    stop, image = min(target.stop_ids), target.image_token_id
    said = {
        "empty": Output("x", [stop], "stop", 0.0, 0.0, []),
        "loop": Output("x", [9, *[7, 8] * 16, stop], "stop", 0.0, 0.0, []),
        "special": Output("x", [7, image, 8, stop], "stop", 0.0, 0.0, []),
        "cut": Output("x", [7, 8], "length", 0.0, 0.0, []),
    }
    for name, output in said.items():
        text = target.decode(output.tokens).strip()
        others = [rule for rule in said if rule != name]
        assert fault(output, text, target, others) is None, name
        assert str(fault(output, text, target, [name])).startswith("degenerate answer, it "), name
    good = Output("x", [7, 8, stop], "stop", 0.0, 0.0, [])
    assert fault(good, "w1 w2", target, list(said)) is None


def test_special_tokens_are_those_that_the_text_would_lack():
    target = tiny.llava()
    silent = {token for token in range(tiny.VOCAB) if not target.decode([token])}
    assert target.special_ids == silent
    assert target.stop_ids | {target.image_token_id} <= silent


def test_degenerate_answers_are_listed_and_have_a_limit_of_their_own(tmp_path: Path):
    records = [record(number) for number in range(12)]
    s = session(tmp_path, records, data__drop="[special]", data__max_bad_share="0", data__max_degenerate_share="1")
    prepared = prepare(s)
    entries = [json.loads(line) for line in (s.folder / "quarantine.jsonl").read_text().splitlines()]
    assert entries
    assert [entry["id"] for entry in entries] == [f"r{k}" for k in prepared.bad]
    assert {entry["reason"].partition(":")[0] for entry in entries} == {"degenerate answer, it holds a special token"}
    assert len(prepared.usable) + len(entries) == 12
    whole = prepare(session(tmp_path, records, run__name="all"))
    assert all(prepared.line(k) == whole.line(k) for k in prepared.usable)
    manifest = json.loads((next(s.folder.glob("answers/*")) / MANIFEST).read_text())
    counts = {"degenerate answer, it holds a special token": len(entries)}
    assert manifest["counts"]["dropped"] == counts
    strict = session(tmp_path, records, run__name="strict", data__drop="[special]", data__max_degenerate_share="0")
    with pytest.raises(
        InputError, match=r"answers are degenerate .*data\.max_degenerate_share.* it holds a special token"
    ):
        prepare(strict)


def test_a_chunk_that_is_answered_again_counts_its_bad_samples_once(tmp_path: Path):
    """At the very share that is allowed, and one that no binary fraction is."""
    records = [record(number) for number in range(100)]
    # A random target may have nothing to say but special tokens.
    speechless = list(prepare(session(tmp_path / "before", records, data__max_bad_share="1.0")).bad)
    s = session(tmp_path, records, data__answer_batch="50", data__max_bad_share="0.29")
    for number in [k for k in range(100) if k not in speechless][: 29 - len(speechless)]:
        (tmp_path / "images" / f"{number}.png").write_text("no picture")
    whole = prepare(s)
    assert len(whole.usable) == 71
    folder = next(s.folder.glob("answers/*"))
    lines = (folder / FINAL).read_bytes().splitlines(keepends=True)
    (folder / FINAL).unlink()
    (folder / "part-0.jsonl").write_bytes(b"".join(lines[:40]))  # killed
    s.quarantine = Quarantine(None)  # another process
    assert prepare(s).usable == whole.usable
    assert (folder / FINAL).read_bytes() == b"".join(lines)


def test_what_is_known_of_a_chunk_stays_when_it_is_answered_again_and_worse(tmp_path: Path):
    """The picture of an answered sample is lost meanwhile; not a single bad one is allowed."""
    s = session(tmp_path, [record(number) for number in range(12)], data__answer_batch="3", data__max_bad_share="0")
    s.target = tiny.llava()
    prepare(s)
    folder = next(s.folder.glob("answers/*"))
    lines = (folder / FINAL).read_bytes().splitlines(keepends=True)
    (folder / FINAL).unlink()
    (folder / "part-1.jsonl").write_bytes(b"".join(lines[:5]))  # of another process, which was killed
    (tmp_path / "images" / "2.png").write_text("no picture")
    s.quarantine = Quarantine(None)
    assert len(prepare(s).usable) == 12
    assert (folder / FINAL).read_bytes() == b"".join(lines)


def test_only_a_fault_of_the_sample_is_kept_as_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s = session(tmp_path, [record(number) for number in range(4)], data__max_bad_share="1")
    prefill, faults = type(s.target).prefill, [ValueError("an odd picture"), MemoryError("out of it")]

    def failing(target: Any, state: Any, row: int, prompt: Any, taps: Any) -> Any:
        if faults:
            raise faults.pop(0)
        return prefill(target, state, row, prompt, taps)

    monkeypatch.setattr(type(s.target), "prefill", failing)
    with pytest.raises(RuntimeError, match="answering r1 failed: MemoryError: out of it"):
        prepare(s)
    prepared = prepare(s)
    assert dict(prepared.bad) == {0: "ValueError: an odd picture"}
    assert prepared.usable == [1, 2, 3]


def test_each_picture_is_decoded_once_for_all_turns_and_whatever_can_never_be_asked_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    records = [record(number, turns=3) for number in range(4)]
    records[1]["conversations"][2]["value"] = " ".join(["w1"] * 400)  # the second question is longer than the context
    opened: list[str] = []
    asked: list[int] = []
    decode, encode = Picture.open, type(tiny.llava()).encode

    def open_(picture: Picture) -> Any:
        opened.append(picture.name)
        return decode(picture)

    def encode_(target: Any, messages: Any, images: Any) -> Any:
        asked.append(len(messages))
        return encode(target, messages, images)

    monkeypatch.setattr(Picture, "open", open_)
    monkeypatch.setattr(type(tiny.llava()), "encode", encode_)
    prepared = prepare(session(tmp_path, records, data__max_length="200"))
    assert sorted(opened) == [f"{number}.png" for number in range(4)]
    assert [asked.count(n) for n in (1, 3, 5)] == [4, 4, 3]
    assert len(prepared.dialogues[1].answers) == 1


# ---- how it is asked ----


def data_of(*overrides: str) -> Any:
    return load(ROOT / "recipes" / "eagle3_tiny.yaml", overrides).data


def test_which_samples_are_sampled_depends_on_seed_and_place_alone():
    n = 4000

    def chosen(*overrides: str) -> set[int]:
        data = data_of(*overrides)
        return {k for k in range(n) if is_sampled(data, k)}

    half = chosen("data.sampled_share=0.5")
    assert abs(len(half) - n / 2) < 160  # five standard deviations
    assert half < chosen("data.sampled_share=0.7", "run.seed=9")
    assert abs(len(half & chosen("data.sampled_share=0.5", "data.answer_seed=1")) - n / 4) < 140
    assert not chosen()


LONG, SHORT = "Please answer with at least 1000 words.", "Answer in one sentence."
INSTRUCTIONS = (
    f"data.instructions=[{{text: '{LONG}', share: 0.25, max_new_tokens: 999}},{{text: '{SHORT}', share: 0.5}}]"
)


def test_instructions_are_asked_of_their_shares():
    data, n = data_of(INSTRUCTIONS), 4000
    found = [instruction_of(data, k) for k in range(n)]
    texts = [one.text if one else "" for one in found]
    for text, share in ((LONG, 0.25), (SHORT, 0.5), ("", 0.25)):
        assert abs(texts.count(text) - n * share) < 160
    assert {answer_limit(data, k) for k in range(n) if texts[k] == LONG} == {999}
    assert {answer_limit(data, k) for k in range(n) if texts[k] != LONG} == {data.max_new_tokens}


def test_an_instruction_stands_behind_the_first_question_when_asking_and_when_training(tmp_path: Path):
    records = [record(number, turns=2) for number in range(8)]
    text = "w3 w4 w5"
    s = session(tmp_path, records, data__instructions=f"[{{text: {text}, share: 0.5}}]")
    plain = session(tmp_path, records, run__name="plain")
    changed = [k for k in range(8) if s.corpus.samples[k] != plain.corpus.samples[k]]
    assert 0 < len(changed) < 8
    for k in range(8):
        mine, its = s.corpus.samples[k], plain.corpus.samples[k]
        assert mine.turns[1:] == its.turns[1:]
        assert mine.turns[0] == (f"{its.turns[0]}\n{text}" if k in changed else its.turns[0])
        assert s.corpus.samples.place(k) == plain.corpus.samples.place(k)
    assert s.corpus.samples[-1] == list(s.corpus.samples)[7] == s.corpus.samples[7:][0]
    answered, before = prepare(s), prepare(plain)
    assert any(answered.dialogues[k].answers != before.dialogues[k].answers for k in changed)
    assert all(answered.line(k) == before.line(k) for k in range(8) if k not in changed)
    k = changed[0]
    prompt = s.target.encode(s.corpus.samples[k].messages((), 1), s.corpus.samples[k].images())
    shorter = s.target.encode(plain.corpus.samples[k].messages((), 1), plain.corpus.samples[k].images())
    assert len(prompt) == len(shorter) + len(text.split())


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.drop=[emty]", "did you mean 'empty'"),
        ("data.sampled_share=1.5", "between 0"),
        ("data.temperature=0", r"greedy is data\.sampled_share=0"),
        ("data.top_p=0", "above 0"),
        ("data.instructions=[{text: x, share: 0.7},{text: y, share: 0.7}]", "add up to 1.4"),
        ("data.instructions=[{text: 'see <image>'}]", "pictures are the records' own"),
        ("data.instructions=[{text: x, max_new_tokens: 0}]", "at least 1"),
        ("data.instructions=[{txt: x}]", "did you mean 'text'"),
        ("data.answer_method=hybrid", r"needs data\.answer_head"),
    ],
)
def test_wrong_settings_are_one_line(override: str, said: str):
    with pytest.raises(InputError, match=said) as error:
        data_of(override)
    assert "\n" not in str(error.value)


def test_given_answers_are_neither_asked_nor_drafted():
    for key in ("sampled_share=0.5", "answer_head=x", "answer_method=pld", "instructions=[{text: x}]"):
        with pytest.raises(InputError, match="the target's own answers"):
            data_of("data.answers=given", f"data.{key}")


# ---- the same answers, whoever drafts ----

TREE = DraftTree(3, 2, 4)
HALF = {"data__sampled_share": "0.5", "data__temperature": "2.0", "data__top_p": "0.9", "data__max_new_tokens": "20"}


def final(s: Session) -> bytes:
    """The answers file of a session, made now by a target in fp64: there is no rounding to blame."""
    s.target = tiny.llava()
    prepare(s)
    return next(s.folder.glob(f"answers/*/{FINAL}")).read_bytes()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[Output]:
    """Drafts in every round, whether it pays or not, and collects the outputs."""
    outputs: list[Output] = []
    listen = regenerate.Worker._heard

    def always(data: Any, target: Any) -> Drafting:
        how = drafting(data, target)
        plain = data.answer_head is None and data.answer_method is None
        return how if plain else replace(how, policy=FixedPolicy(TREE.depth, TREE.budget))

    def heard(worker: regenerate.Worker, output: Output) -> None:
        outputs.append(output)
        listen(worker, output)

    monkeypatch.setattr(regenerate, "drafting", always)
    monkeypatch.setattr(regenerate.Worker, "_heard", heard)
    return outputs


@pytest.mark.parametrize("batch", ["1", "3"])
@pytest.mark.parametrize("who", ["head", "pld", "sam", "hybrid"])
def test_a_drafter_changes_no_byte_of_the_answers(tmp_path: Path, eager: list[Output], who: str, batch: str):
    """Greedy and sampled, in another batch than without a drafter."""
    records = [record(number, turns=1 + number % 2) for number in range(14)]
    plain = final(session(tmp_path, records, run__name="plain", **HALF))
    assert all(action == "skip" for output in eager for action, *_ in output.rounds)
    eager.clear()
    how = {} if who == "head" else {"data__answer_method": who}
    if who in ("head", "hybrid"):
        how["data__answer_head"] = str(tiny.run_folder(tmp_path / "head", tiny.llava(), TREE))
    drafted = final(session(tmp_path, records, run__name="drafted", data__answer_batch=batch, **HALF, **how))
    assert any(action == "draft" for output in eager for action, *_ in output.rounds)
    assert drafted == plain
    names = [next((tmp_path / "runs" / name).glob("answers/*")).name for name in ("plain", "drafted")]
    assert names[0] == names[1]
    manifest = json.loads((tmp_path / "runs" / "drafted" / "answers" / names[1] / MANIFEST).read_text())
    assert manifest["complete"]
    assert manifest["work"][0]["drafted_by"].get("method", who) == (who if who != "head" else "head")
    assert str(tmp_path) not in json.dumps(manifest)


def test_only_sampled_answers_are_sampled(tmp_path: Path):
    records = [record(number) for number in range(16)]
    s = session(tmp_path, records, run__name="half", **HALF)
    half = final(s).splitlines()
    greedy = final(session(tmp_path, records, run__name="greedy", data__max_new_tokens="20")).splitlines()
    sampled = {k for k in range(16) if is_sampled(s.recipe.data, k)}
    assert {k for k in range(16) if half[k] != greedy[k]} == sampled


def test_answers_are_compared_with_a_drafter_and_without(tmp_path: Path, capsys: Any):
    records = [record(number, turns=1 + number % 2) for number in range(10)]
    s = session(tmp_path, records, data__answer_method="pld", **HALF)
    s.target = tiny.llava()
    s.tracker.active = True
    plain, other = compare(s, 6)
    assert len(plain.outputs) == 6
    assert n_equal((plain, other)) == len(plain.said) == len(other.said)
    assert plain.seconds > 0
    assert "ratio " in capsys.readouterr().out
    assert not list(s.folder.glob("answers/*/*"))
    assert sorted(compare(s, 99)[0].outputs) == list(range(10)), "more than there are: all"
    other.outputs[0][0].tokens[-1] += 1
    assert n_equal((plain, other)) == len(plain.said) - 1
    with pytest.raises(InputError, match="needs somebody to draft"):
        compare(session(tmp_path, records), 6)
