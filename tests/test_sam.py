"""SAM decoding: automata against searches of all strings, defects of other implementations, files, real decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mmspec.drafters._automaton import NESTED, Automaton, StaticAutomaton, freeze, save
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.sam import PREFER, Config, SamDrafter, SuffixStream, make
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.targets import load_vocabulary
from mmspec.types import InputError, Plan, Request
from scripts import build_sam
from tests.families import requests
from tests.tiny import llava, prompt

SCRIPT = Path(__file__).parent.parent / "scripts" / "build_sam.py"
STREAMS = st.lists(st.lists(st.integers(-1, 3), max_size=8), max_size=10)
CORPORA = st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=5)


def longest_match(tokens: list[int], prefer: str) -> tuple[int, int]:
    """Length of the longest suffix that occurred before, and where it was followed by something, by looking at all."""
    for length in range(len(tokens), 0, -1):
        suffix = tokens[-length:]
        ends = [i for i in range(length, len(tokens)) if tokens[i - length : i] == suffix]
        if min(suffix) >= 0 and ends:
            return length, ends[0] if prefer == "first" else ends[-1]
    return 0, 0


def copy(tokens: list[int], start: int, length: int) -> list[int]:
    """What follows from `start` on, token by token, the copied ones included; up to an image."""
    text = list(tokens)
    for i in range(length):
        if text[start + i] < 0:
            break
        text.append(text[start + i])
    return text[len(tokens) :]


def corpus(documents: list[list[int]]) -> StaticAutomaton:
    return StaticAutomaton(arrays_of(documents))


def arrays_of(documents: list[list[int]]) -> dict[str, np.ndarray]:
    automaton, ends = Automaton(), []
    for document in documents:
        automaton.cut()
        for token in document:
            automaton.append(token, len(ends))
            ends.append(automaton.last)
    return freeze(automaton, ends)


def occurrences(documents: list[list[int]]) -> Counter[tuple[int, ...]]:
    """How often each string occurs in the documents."""
    return Counter(tuple(d[i:j]) for d in documents for i in range(len(d)) for j in range(i + 1, len(d) + 1))


# ---- the text's own automaton


@given(STREAMS, st.sampled_from(PREFER), st.integers(0, 12), st.sampled_from([0.5, 1.0, 4.0]))
def test_the_match_is_the_longest_suffix_that_occurred_before(pieces, prefer, length, alpha):
    stream, text = SuffixStream(Config(alpha=alpha, prefer=prefer)), []
    for piece in pieces:
        stream.extend(piece)
        text += piece
        matched, start = longest_match(text, prefer)
        assert stream.matched == matched
        wanted = copy(text, start, min(length, int(alpha * matched))) if matched else []
        assert stream.draft(length, 99)[0] == wanted == stream.draft(99, length)[0]
        assert stream.draft(length, 99)[1] == list(range(len(wanted)))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
def test_the_automaton_is_as_small_as_the_theory_says(text):
    automaton = Automaton()
    for i, token in enumerate(text):
        automaton.append(token, i)
    n = len(text)
    assert len(automaton.next) <= max(2 * n - 1, 2)
    assert sum(map(len, automaton.next)) <= max(3 * n - 4, 3)


@pytest.mark.parametrize("prefer", PREFER)
def test_in_a_long_loop_a_match_stays_exact_and_a_draft_full(prefer):
    stream, text = SuffixStream(Config(prefer=prefer)), [7, 8, 9] * (2 * NESTED)
    stream.extend(text)
    assert stream.matched == len(text) - 3
    assert text[stream.start - stream.matched : stream.start] == text[-stream.matched :]
    assert stream.draft(39, 39)[0] == [7, 8, 9] * 13


def test_settings_limit_the_draft():
    text = [5, 6, 7, 8, 9, 10, 11, 1, 5, 6]
    for settings, wanted in (
        ({}, [7, 8, 9, 10, 11, 1, 5, 6]),
        ({"n_predicts": 4}, [7, 8, 9]),
        ({"alpha": 1.0}, [7, 8]),
    ):
        stream = SuffixStream(Config(**settings))
        stream.extend(text)
        assert stream.draft(39, 39)[0] == wanted
        assert stream.draft(39, 1)[0] == wanted[:1]
    assert (Config(n_predicts=12).depth, Config(n_predicts=12).budget) == (11, 11)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_predicts": 1}, "n_predicts must be at least 2, got 1"),
        ({"alpha": 0.0}, "alpha must be above 0, got 0.0"),
        ({"prefer": "last"}, "'last'"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"static_bias": -1}, "static_bias must be at least 0, got -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(**settings)


# ---- what other implementations get wrong


def test_the_newest_token_is_matched_with_its_context():
    """Inserted first and looked up afterwards, it would be its own match: one token of context, the first place."""
    stream = SuffixStream(Config())
    stream.extend([1, 7, 2, 4, 6, 7, 3, 9, 4, 6])
    stream.extend([7])
    assert stream.matched == 3
    assert stream.draft(2, 2)[0] == [3, 9]


def test_repetitions_are_neither_stopped_nor_removed():
    target = llava()
    wanted = [Request(f"r{i}", prompt(target, i, 5, images=i % 2), 120) for i in range(6)]
    plain = [o.tokens for o in generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())]
    assert any(repeats(tokens) for tokens in plain), "no answer repeats itself"
    assert [o.tokens for o in decode(target, wanted)] == plain


def repeats(tokens: list[int]) -> bool:
    """Whether something stands three times in a row."""
    return any(
        tokens[i : i + n] == tokens[i + n : i + 2 * n] == tokens[i + 2 * n : i + 3 * n]
        for n in range(1, 20)
        for i in range(len(tokens) - 3 * n + 1)
    )


@pytest.mark.parametrize("limit", [1, 2, 7, 30])
def test_no_answer_is_longer_than_asked_for(limit):
    target = llava()
    wanted = [Request(f"r{i}", prompt(target, i, 5), limit) for i in range(4)]
    plain = [o.tokens for o in generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())]
    drafted = [o.tokens for o in decode(target, wanted, static=corpus([*plain, [3] * 60]))]
    assert drafted == plain
    assert max(map(len, drafted)) <= limit


def test_sampled_text_is_sampled():
    """Verification by argmax at a temperature above 0 would give greedy text wherever something was drafted."""
    target, draw = llava(), KeyedSampler(1.2, seed=5)
    wanted = requests(target, 9, 60)
    plain = [o.tokens for o in generate(target, wanted, NullDrafter(), SkipPolicy(), draw)]
    greedy = [o.tokens for o in generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())]
    outputs = decode(target, wanted, sampler=draw, static=corpus(greedy))
    assert [o.tokens for o in outputs] == plain != greedy
    assert sum(nodes for o in outputs for _, nodes, _, _ in o.rounds)


def test_images_are_neither_matched_nor_drafted():
    target = llava()
    one = prompt(target, 1, 5, images=2)
    drafter = SamDrafter()
    drafter.open(1, 64)
    text = [int(t) for t, v in zip(one.input_ids, one.visual) if not v]
    for root in dict.fromkeys(text):
        drafter.admit(0, Request("r", one, 9), None, torch.tensor(root))
        tree = drafter.propose(torch.tensor([root]), Plan(39, (39,)))
        assert target.image_token_id not in tree.tokens[0].tolist()
        assert -1 not in tree.tokens[0].tolist()
    stream = SuffixStream(Config())
    stream.extend([4, -1, 5, 6, 4, -1, 5])
    assert (stream.matched, stream.draft(9, 9)[0]) == (1, [6, 4])
    stream.extend([-1])
    assert (stream.matched, stream.draft(9, 9)) == (0, ([], []))


# ---- the automaton of a corpus


@given(CORPORA, st.lists(st.integers(-1, 4), max_size=20))
def test_a_walk_knows_the_longest_suffix_and_how_often_it_occurs(documents, text):
    static, known = corpus(documents), occurrences(documents)
    for string, count in known.items():
        state = matched = 0
        for token in string:
            state, matched = static.step(state, matched, token)
        assert (matched, static.counts[state]) == (len(string), count)
    stream = SuffixStream(Config(), static)
    for end, token in enumerate(text, start=1):
        stream.extend([token])
        assert stream.known == max((n for n in range(1, end + 1) if tuple(text[end - n : end]) in known), default=0)


@given(CORPORA, st.integers(1, 5), st.integers(0, 8), st.integers(1, 3))
def test_a_draft_from_a_corpus_is_the_best_tree_within_its_limits(documents, depth, budget, width):
    static, known = corpus(documents), occurrences(documents)
    alphabet = {token for document in documents for token in document}
    for context in known:
        state = matched = 0
        for token in context:
            state, matched = static.step(state, matched, token)
        tokens, parents = static.expand(state, depth, budget, width)
        assert all(parent < node for node, parent in enumerate(parents, start=1))
        paths = [context]
        for token, parent in zip(tokens, parents):
            paths.append((*paths[parent], token))
        assert len(set(paths)) == len(paths), "siblings with one token"
        counts = [known[path] for path in paths[1:]]
        assert all(a >= b > 0 for a, b in pairwise([*counts, 1]))
        levels = Counter(len(path) - len(context) for path in paths[1:])
        assert len(tokens) <= budget
        assert all(level <= depth and n <= width for level, n in levels.items())
        left_out = {(*path, token) for path in paths for token in alphabet} & set(known) - set(paths)
        for path in left_out:
            level = len(path) - len(context)
            better = [known[p] for p in paths[1:] if len(p) == len(path)]
            full = len(better) == width and known[path] <= min(better)
            assert level > depth or full or (len(tokens) == budget and known[path] <= min(counts, default=9**9))


def test_no_match_and_no_draft_crosses_two_documents():
    static = corpus([[1, 2, 3], [3, 4], [1, 2, 3]])
    state = matched = 0
    for token in (2, 3):
        state, matched = static.step(state, matched, token)
    assert static.expand(state, 4, 9, 8) == ([], [])
    state, matched = static.step(state, matched, 4)
    assert matched == 2, "3, 4 are of the second document, 2, 3, 4 of none"


def test_the_corpus_drafts_where_it_knows_clearly_more():
    static = corpus([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [1, 2, 3, 4, 6]])
    for bias, wanted in ((0, [6, 5]), (2, [6, 5]), (3, [9])):
        stream = SuffixStream(Config(static_bias=bias), static)
        stream.extend([4, 9, 1, 2, 3, 4])
        assert (stream.matched, stream.known, stream.match()) == (1, 4, max(1, 4 - bias))
        assert stream.draft(1, 9)[0] == wanted
    assert stream.draft(1, 0)[0] == []


# ---- files


def about(target, **other):
    return {"vocabulary": target.vocabulary, "target": target.name, **other}


def test_a_file_is_mapped_and_drafts_as_before(tmp_path):
    path, target = tmp_path / "sam.safetensors", llava()
    arrays = arrays_of([[5, 6, 7, 8], [6, 7, 9], [6, 7, 9, 5]])
    save(path, arrays, **about(target))
    loaded, made = StaticAutomaton.load(path, target.vocabulary, target.name), StaticAutomaton(arrays)
    for name in arrays:
        assert getattr(loaded, name) == getattr(made, name)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
    drafter = make(Config(static=str(path), static_bias=0), target)
    drafter.open(1, 64)
    drafter.rows[0] = drafter.start()
    drafter.rows[0].extend([6, 7])
    assert drafter.propose(torch.tensor([7]), Plan(2, (3,))).tokens.tolist() == [[7, 9, 8, 5]]


def test_files_that_do_not_fit_are_refused(tmp_path):
    target, path = llava(), tmp_path / "sam.safetensors"

    def refused():
        with pytest.raises(InputError) as caught:
            make(Config(static=str(path)), target)
        assert "\n" not in str(caught.value)
        assert "scripts/build_sam.py" in str(caught.value)
        return str(caught.value)

    assert f"{path} does not exist" in refused()
    path.write_bytes(b"nothing of the kind")
    assert f"{path} cannot be read" in refused()
    save_file({"link": np.zeros(3, np.int32)}, path)
    assert "no static automaton of this version" in refused()
    save(path, arrays_of([[1]]), vocabulary="0123456789abcdef", target="another")
    said = refused()
    assert "0123456789abcdef of another" in said
    assert target.vocabulary in said


def test_the_script_reads_what_users_have(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "answers" / "key").mkdir(parents=True)
    lines = [
        {"index": 0, "id": "a", "answers": ["The circle is red.", "It is"], "finished": [True, False], "length": 9},
        {"index": 1, "bad": "image is missing"},
    ]
    (run / "answers" / "key" / "part-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A blue star."}]
    parts = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]
    (tmp_path / "talk.json").write_text(json.dumps([{"id": "x", "conversations": said}, {"messages": parts}]))
    records = [
        {"output_ids": [300, 301, 2]},
        [300, 301],
        "A green star.",
        {"text": "A red star."},
        {"output_ids": [-4]},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "plain.txt").write_text("One text\nof two lines.\n\nAnother.\n")
    out = tmp_path / "out" / "sam.safetensors"
    files = [run, *(tmp_path / name for name in ("talk.json", "log.jsonl", "plain.txt"))]
    words = [*files, "--target", "tiny_llava", "--out", out, "--max-bad-share", "0.2"]
    assert build_sam.main([*map(str, words)]) == 0
    said = capsys.readouterr().out
    assert "10 documents" in said
    assert "quarantined: 1" in said
    assert json.loads(out.with_name(f"{out.name}.quarantine.jsonl").read_text())["line"] == 5
    vocabulary = load_vocabulary("tiny_llava")
    static = StaticAutomaton.load(out, vocabulary.fingerprint, "tiny_llava")
    for text, stop in (("The circle is red.", True), ("It is", False), ("A blue star.", True), ("A red star.", False)):
        state = matched = 0
        ids = vocabulary.tokenizer(text, add_special_tokens=False)["input_ids"]
        for token in ids:
            state, matched = static.step(state, matched, token)
        assert matched == len(ids)
        assert (vocabulary.tokenizer.eos_token_id in static.expand(state, 1, 9, 9)[0]) == stop


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.jsonl", "--out", "x"], "nowhere.jsonl does not exist"),
        ([".", "--out", "x"], "holds no answers"),
        (["nowhere.jsonl"], "--out"),
        (["nowhere.jsonl", "--out", "x", "--max-tokens", "-1"], "--max-tokens must not be negative, got -1"),
    ],
)
def test_the_script_refuses_in_one_line(words, said, capsys):
    assert build_sam.main([*words, "--target", "tiny_llava"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("build_sam: error: ")
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.slow
def test_the_script_runs_by_itself():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "what is read" in done.stdout


# ---- decoding


def decode(target, wanted, sampler=None, static=None, batch=1, drafter=None, **settings):
    """Outputs of a real run at full draft length."""
    drafter = drafter or SamDrafter(Config(static_bias=0, **settings), static)
    policy = FixedPolicy(drafter.config.depth, drafter.config.budget)
    return generate(target, wanted, drafter, policy, sampler or GreedySampler(), max_batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sampler", [GreedySampler(), KeyedSampler(0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
def test_the_text_is_that_of_plain_decoding(sampler, batch):
    target = llava()
    wanted = requests(target, 9, 40)
    plain = [o.tokens for o in generate(target, wanted, NullDrafter(), SkipPolicy(), sampler)]
    for prefer in PREFER:
        for static in (None, corpus([*plain[::2], [3, 4] * 9])):
            outputs = decode(target, wanted, sampler, static, batch, prefer=prefer)
            assert [o.tokens for o in outputs] == plain
            assert sum(nodes for o in outputs for _, nodes, _, _ in o.rounds), "nothing was ever drafted"
    assert sum(accepted for o in outputs for _, _, accepted, _ in o.rounds), "the corpus held the answers"
