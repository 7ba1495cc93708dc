"""The parts of the evaluation, each against the mistake it could make; no model is needed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval import bench as bench_module
from eval.bench import Bench, Method, Result
from eval.lineup import file_hash, named_files, without_places
from eval.plots import Series, line_chart, ticks
from eval.policy_runs import AGAIN, Scored
from eval.ranks import Ranks
from eval.report import render
from eval.report_dependence import joined
from eval.report_views import leaders
from eval.rows import Rows, as_row, from_row, read
from eval.samples import texts
from eval.summary import busiest, clean, figures, gained, hardware, summarise, unreliable
from eval.tasks import PLAIN, Dialogues, balanced, check_left_out
from mmspec import metrics
from mmspec.records import Quarantine, Record
from mmspec.types import InputError, Output, Prompt, Request


def record(n: int, topic: str, turns: int = 1) -> Record:
    return Record(f"r{n}", None, tuple(f"question {t}" for t in range(turns)), "", topic, n)


class WordTarget:
    """Encodes a conversation as one token a word and decodes ids as letters."""

    max_length = 40
    name = "words"
    device = torch.device("cpu")

    def encode(self, messages: Sequence[Any], images: Sequence[Any]) -> Prompt:
        words = [word for message in messages for part in message["content"] for word in part["text"].split()]
        return Prompt(torch.arange(len(words)), torch.zeros(len(words), dtype=torch.bool))

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(chr(97 + token) for token in tokens)


def dialogues(records: Sequence[Record], system: str = "") -> Dialogues:
    target: Any = WordTarget()
    return Dialogues(target, records, system, 8, Quarantine(None))


def test_a_limit_keeps_the_topics_balanced_and_the_order() -> None:
    records = [record(n, topic) for n, topic in enumerate("aaaaabbc")]
    assert [r.id for r in balanced(records, 4)] == ["r0", "r1", "r5", "r7"]
    assert balanced(records, 99) == balanced(records, None) == records


def test_groups_mix_neither_topics_nor_turns_of_one_record() -> None:
    records = [record(0, "a"), record(1, "b", 3), record(2, "a", 2), record(3, "b", 2), record(4, "b")]
    made = dialogues(records)
    seen = []
    for group in made.groups(2):
        assert len({task.record.topic for task in group}) == 1
        assert len({task.record.id for task in group}) == len(group)
        for task in group:
            made.answer(task, f" answer{task.turn} ")
        seen.append([(task.record.id, task.turn) for task in group])
    assert seen == [
        [("r0", 1), ("r2", 1)],
        [("r2", 2)],
        [("r1", 1), ("r3", 1)],
        [("r4", 1)],
        [("r1", 2), ("r3", 2)],
        [("r1", 3)],
    ]
    texts = [part["text"] for message in made.messages(records[1], 3) for part in message["content"]]
    assert texts == ["question 0", "answer1", "question 1", "answer2", "question 2"]
    assert [m["role"] for m in made.messages(records[1], 3)] == ["user", "assistant", "user", "assistant", "user"]


def test_a_system_text_comes_first_and_only_when_there_is_one() -> None:
    assert dialogues([record(0, "a")], "be kind").messages(record(0, "a"), 1)[0]["role"] == "system"
    assert dialogues([record(0, "a")]).messages(record(0, "a"), 1)[0]["role"] == "user"


def test_noise_keys_depend_on_id_and_turn_only() -> None:
    few = next(iter(dialogues([record(3, "a")]).groups(1)))[0]
    many = [group[0] for group in dialogues([record(n, "a") for n in (9, 3)]).groups(1)]
    assert few.request.key == many[1].request.key
    assert many[0].request.key != many[1].request.key


def test_a_prompt_that_outgrows_the_context_drops_the_rest_of_its_record() -> None:
    made = dialogues([record(0, "a", 3), record(1, "a")])
    for group in made.groups(1):
        for task in group:
            made.answer(task, "word " * 50)
    assert made.quarantine.count == 1
    assert "context" in next(iter(made.quarantine.reasons()))
    assert made.n_turns == 1


class Script:
    """Stands in for the loop: notes who decodes, and gives each method its own tokens."""

    def __init__(self, tokens: dict[str, list[int]], gaps: list[float]) -> None:
        self.tokens, self.gaps, self.calls = tokens, gaps, []

    def __call__(self, target: Any, requests: Sequence[Request], drafter: Any, *_: Any, **words: Any) -> list[Output]:
        self.calls.append((drafter, words["want_gaps"], requests[0].id))
        tokens = self.tokens[drafter]
        rounds = [("skip", 0, 0, 1)] * (len(tokens) - 1)
        return [
            Output(r.id, tokens, "stop", 0.1, 1.0, rounds, self.gaps if words["want_gaps"] else []) for r in requests
        ]


def scripted(monkeypatch: pytest.MonkeyPatch, script: Script, n: int) -> list[Result]:
    monkeypatch.setattr(bench_module, "generate", script)
    target: Any = WordTarget()
    methods = [Method(name, name, None) for name in script.tokens]  # type: ignore[arg-type]
    results: list[Result] = []
    Bench(target, methods, None, 1).run(dialogues([record(i, "a") for i in range(n)]), results.extend)
    return results


def test_methods_alternate_in_abba_order(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script({"plain": [1, 2], "a": [1, 2], "b": [1, 2]}, [])
    results = scripted(monkeypatch, script, 3)
    assert [call[0] for call in script.calls] == ["plain", "a", "b", "b", "a", "plain", "plain", "a", "b"]
    assert not any(call[1] for call in script.calls), "gaps are not asked for while the clock runs"
    assert [result.method for result in results] == ["plain", "a", "b"] * 3, "results keep the methods' order"
    assert all(result.match.identical for result in results)


@pytest.mark.parametrize(("gap", "tie"), [(9e-5, True), (2e-4, False)])
def test_a_divergence_fetches_gaps_in_an_untimed_pass_and_is_a_tie_or_not(
    monkeypatch: pytest.MonkeyPatch, gap: float, tie: bool
) -> None:
    script = Script({"plain": [1, 2, 3], "a": [1, 7, 3]}, [1.0, gap, 1.0])
    plain, other = scripted(monkeypatch, script, 1)
    assert [call[:2] for call in script.calls] == [("plain", False), ("a", False), ("plain", True)]
    assert plain.match.identical
    assert other.match == metrics.Match(1, tie)


def result(topic: str, method: str, group: int, seconds: float, image: str, n: int = 5) -> Result:
    output = Output("x", list(range(n)), "stop", 0.01, seconds, [("draft", 4, n - 2, n - 1)])
    return Result("x", topic, image, 1, method, output, "", group, seconds, metrics.Match(None, False), 9, 4)


def of_one_token(method: str) -> Result:
    output = Output("x", [1], "stop", 0.1, 0.1, [])
    return Result("x", "t", "i", 1, method, output, "", 0, 0.1, metrics.Match(None, False), 9, 0)


def test_figures_by_hand() -> None:
    plain = [result("t", "plain", g, s, f"i{g}") for g, s in enumerate([4.0, 2.0])]
    mine = [result("t", "m", g, s, f"i{g}") for g, s in enumerate([1.0, 1.0])]
    row = figures(mine, plain, 1, 0)
    assert row["speedup"] == 3.0
    assert (row["speedup_lo"], row["speedup_hi"]) == (2.0, 4.0)
    assert (row["mat"], row["mat_without_bonus"], row["n_tokens"], row["tokens_per_s"]) == (4.0, 3.0, 10, 5.0)
    assert (row["latency_p50_s"], row["exact_match"], row["skip_rate"]) == (1.0, 1.0, 0.0)


def test_in_a_batch_the_group_s_seconds_count_once() -> None:
    plain = [result("t", "plain", 0, 6.0, "i0"), result("t", "plain", 0, 6.0, "i1")]
    mine = [result("t", "m", 0, 2.0, "i0"), result("t", "m", 0, 2.0, "i1")]
    row = figures(mine, plain, 2, 0)
    assert row["speedup"] == 3.0
    assert row["tokens_per_s"] == 5.0
    assert row["speedup_lo"] is None, "one group has no interval"


def test_plain_decoding_has_the_mean_time_of_its_two_runs() -> None:
    scored = object.__new__(Scored)
    scored.args = argparse.Namespace(batch_size=1, seed=0)
    scored.results = [
        result("t", name, g, seconds, f"i{g}")
        for g in range(2)
        for name, seconds in ((PLAIN, 2.0), (AGAIN, 4.0), ("m", 1.5), ("n", 3.0))
    ]
    assert scored.figures("m")["speedup"] == pytest.approx(2.0)
    assert scored.figures(AGAIN)["speedup"] == pytest.approx(0.5), "what the two differ by is not averaged away"
    assert scored.figures("m", "n")["speedup"] == pytest.approx(2.0)
    scored.results = [r for r in scored.results if r.method != AGAIN]
    assert scored.figures("m")["speedup"] == pytest.approx(2 / 1.5)


def test_summary_holds_valid_json_and_the_primary_s_figures_on_top() -> None:
    lone = [of_one_token(name) for name in ("plain", "m")]
    summary = summarise(lone, ["plain", "m"], "m", 1, 0)
    json.dumps(summary, allow_nan=False)
    assert summary["mat"] is None, "an answer of one token has no rounds"
    assert summary["n_requests"] == 1
    assert clean({"a": [math.nan, 1.0, (math.inf,)]}) == {"a": [None, 1.0, [None]]}
    assert clean({"a": [2 / 3, 3, math.nan, True]}, 3) == {"a": [0.667, 3, None, True]}


def test_a_report_of_answers_without_rounds_still_renders() -> None:
    lone = [of_one_token(name) for name in ("plain", "m")]
    summary = summarise(lone, ["plain", "m"], "m", 1, 0)
    settings = dict.fromkeys(("checkpoint", "data", "target", "dtype", "max_new_tokens", "n_records"), 0)
    summary |= {"contention": {"other_cores": 1.5, "unreliable": True}}
    summary |= {"cells": [{"batch_size": 1, "temperature": 0.0, **summary}]}
    summary |= {
        "quarantined": {"count": 0, "reasons": {}},
        "settings": settings | {"tie_gap": 1e-4, "methods": {}},
        "versions": {},
        "hardware": hardware(torch.device("cpu")),
        "definitions": {},
    }
    page = render(clean(summary), [])
    assert "Other processes used 1.5 cores" in page
    assert "one image: no interval" in page


def test_bars_stay_on_their_axis() -> None:
    row = {"speedup": 2.9, "speedup_lo": 2.5, "speedup_hi": 4.7, "mat": 3.0, "tokens_per_s": 9.0}
    row |= {"exact_match": 1.0, "ties": 0, "diverged": 0}
    methods = {name: {"overall": row} for name in ("plain", "m")}
    claim = {"method": "m", "p_holm": 0.01}
    chart = leaders({"methods": methods, "claims": {"faster_than_plain": [claim]}})
    (bar,) = chart["rows"]
    assert bar["lo"] + bar["span"] <= 100
    assert bar["width"] == pytest.approx(58.0)
    assert chart["one"] == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("top", "expected"),
    [(3.4, [0, 1, 2, 3, 4]), (1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.0, [0, 1]), (math.nan, [0, 1])],
)
def test_ticks_are_round_and_cover_the_data(top: float, expected: list[float]) -> None:
    assert ticks(top) == pytest.approx(expected)


def test_charts_escape_names() -> None:
    svg = line_chart([Series("<b>", "m0", [(0, 0), (1, 1)])], "x <", "y &", [0, 1], [0, 1])
    assert "<b>" not in svg
    assert "&lt;b&gt;" in svg


def test_pieces_give_back_the_whole_text_with_its_sources() -> None:
    class Bytes:
        """A token a byte, so that one character can take several tokens."""

        def decode(self, tokens: Sequence[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    text = "grün × 3"
    rounds = [("draft", 4, 2, 3), ("skip", 0, 0, 1), ("draft", 4, 9, 5)]
    target: Any = Bytes()
    tokens = texts(target, list(text.encode()), rounds)
    cut = joined({"tokens": tokens}, [None] * len(tokens))
    assert "".join(piece["text"] for piece in cut) == text
    assert [(piece["source"], piece["text"]) for piece in cut] == [
        ("prefill", "g"),
        ("draft", "r"),
        ("bonus", "ü"),  # its first byte was drafted, but it became a character here
        ("skip", "n"),
        ("draft", " × 3"),
    ]


def test_contention_is_called_out_only_when_cores_were_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert unreliable(1.0, 2)
    assert not unreliable(0.1, 2)
    assert not unreliable(1.0, 1)
    assert not unreliable(None, 2)


def test_of_the_sittings_the_busiest_counts() -> None:
    """Of two processes, each with a core of its own; in the second sitting one of them finished nothing."""

    def line(sitting: float, group: int, all_cores: float) -> dict[str, Any]:
        return {"sitting": sitting, "group": group, "busy": [all_cores, 1.0]}

    first = [line(1.0, 0, 9.0), line(1.0, 2, 3.0), line(1.0, 1, 3.0)]
    assert busiest(first, 2) == 1.0, "what a process saw up to its last group"
    assert busiest([*first, line(2.0, 4, 9.0), line(3.0, 3, 2.0), line(3.0, 6, 2.0)], 2) == 1.0
    assert busiest([line(3.0, 3, 2.0), line(3.0, 6, 2.0), *first], 2) == 1.0
    assert busiest([{"sitting": 1.0, "group": 0, "busy": None}], 1) is None
    assert busiest([], 2) is None


def test_what_is_left_out_is_said_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    quarantine = Quarantine(None)
    quarantine.n_read = 20
    check_left_out(quarantine, 0.0)
    assert capsys.readouterr().out == ""
    quarantine.add("mmspec.jsonl", 1, "r1", "prompt longer than the context: turn 1 has 99 tokens")
    check_left_out(quarantine, 0.05)
    assert capsys.readouterr().out == "left out: 1 of 20 records, most often (1x): prompt longer than the context\n"
    quarantine.n_read = 10
    with pytest.raises(InputError, match=r"1 of 10 records are unusable \(10\.0%, allowed 5\.0%\)"):
        check_left_out(quarantine, 0.05)


def test_settings_name_no_folder_and_their_files_are_known_by_content(tmp_path: Path) -> None:
    """Also those of the method that a hybrid copies by."""
    automaton = tmp_path / "sam.safetensors"
    automaton.write_text("a")
    settings = {"retrieval": "sam", "min_match": 2, "settings": {"static": str(automaton), "prefer": "recent"}}
    shown = {"retrieval": "sam", "min_match": 2, "settings": {"static": "sam.safetensors", "prefer": "recent"}}
    assert without_places(settings) == shown
    assert without_places({"tree": "runs/fitted/tree.json", "some": ["/a/b"]}) == {"tree": "tree.json", "some": ["b"]}
    before = named_files(settings)
    assert before == {"settings": {"static": file_hash(automaton)}}
    automaton.write_text("b")
    assert named_files(settings) != before


def test_a_gain_without_an_interval_is_said_without_one() -> None:
    assert gained({"gain": 0.1, "gain_lo": 0.05, "gain_hi": 0.15}) == "+0.100 [+0.050, +0.150]"
    assert gained({"gain": -0.1, "gain_lo": None, "gain_hi": None}) == "-0.100"


def test_hardware_names_no_host(tmp_path: Path) -> None:
    words = json.dumps(hardware(torch.device("cpu")))
    node = SimpleNamespace(name=__import__("platform").node()).name
    assert not node or node not in words


def test_own_histories_ask_a_method_what_follows_its_own_answer() -> None:
    target: Any = WordTarget()
    made = Dialogues(target, [record(0, "a", 3)], "", 8, Quarantine(None), "self")
    groups = made.groups(1)
    (task,) = next(groups)
    assert not task.own
    for method, text in (("plain", "yes"), ("same", "yes"), ("other", "no it is not")):
        made.answer(task, text, method)
    (task,) = next(groups)
    assert set(task.own) == {"other"}
    assert task.asked("same") is task.asked("plain") is task.request
    assert len(task.asked("other").prompt) == len(task.request.prompt) + 3
    assert task.asked("other").key == task.request.key, "the noise is that of the request"


def test_behind_a_tie_an_own_history_is_no_new_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "generate", Script({"plain": [1, 2, 3], "a": [1, 7, 3]}, [1.0, 1e-6, 1.0]))
    target: Any = WordTarget()
    results: list[Result] = []
    bench = Bench(target, [Method(name, name, None) for name in ("plain", "a")], None, 1)  # type: ignore[arg-type]
    bench.run(Dialogues(target, [record(0, "a", 2)], "", 8, Quarantine(None), "self"), results.extend)
    assert [(r.turn, r.method, r.match) for r in results if r.method == "a"] == [
        (1, "a", metrics.Match(1, True)),
        (2, "a", metrics.Match(1, True)),
    ]
    assert results[1].gap == 1e-6


def test_processes_share_conversations_topic_by_topic() -> None:
    records = [record(n, topic) for n, topic in enumerate("aabbbbcaab")]
    shares = [[r.id for r in Ranks(rank, 3).mine(records)] for rank in range(3)]
    assert sorted(id for share in shares for id in share) == sorted(r.id for r in records)
    for topic in "ab":
        sizes = [sum(r.id in share for r in records if r.topic == topic) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    assert Ranks().mine(records) == records


def test_an_interruption_at_any_byte_loses_no_whole_line_and_leaves_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    rows = Rows(path)
    for group in range(3):
        some = [result("t", name, group, 1.0, "i") for name in ("plain", "m")]
        facts = {"run_id": "x", "batch": 1, "temperature": 0.0}
        rows.append(as_row(replace(one, steps=[(4, 1, 2, 3)]), facts) for one in some)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        Rows(path, run_id="x", resume=True)
        assert path.read_bytes() == b"".join(
            line for n, line in enumerate(lines) if sum(map(len, lines[: n + 1])) <= cut
        )
    path.write_bytes(whole)
    with pytest.raises(InputError, match="holds results of another run"):
        Rows(path, run_id="y", resume=True)
    assert from_row(read(path)[1]).output.rounds == [("draft", 4, 3, 4)]
