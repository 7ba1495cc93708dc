"""Prompt lookup: the index against a scan, and what is drafted from real streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmspec.drafters.pld import Config, NGramIndex, PromptLookupDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy
from mmspec.sampling import GreedySampler
from mmspec.types import Plan, Request
from tests.tiny import llava, prompt


def by_scan(stream: list[int], config: Config, length: int) -> list[int]:
    """What the index should find, by looking at every earlier position."""
    for n in range(min(config.max_ngram, len(stream)), config.min_ngram - 1, -1):
        context = stream[-n:]
        ends = [i + n for i in range(len(stream) - n) if stream[i : i + n] == context and min(context) >= 0]
        if ends:
            start = ends[-1] if config.prefer == "recent" else ends[0]
            copied = stream[start : start + length]
            return copied[: copied.index(-1)] if -1 in copied else copied
    return []


@given(
    st.lists(st.lists(st.integers(-1, 4), max_size=6), max_size=12),
    st.sampled_from(["recent", "first"]),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(1, 6),
)
def test_the_index_finds_what_a_scan_finds(pieces, prefer, min_ngram, more, length):
    config = Config(min_ngram + more, min_ngram, 10, prefer)
    index, stream = NGramIndex(config), []
    for piece in pieces:
        index.extend(piece)
        stream += piece
        assert index.draft(length, length)[0] == by_scan(stream, config, length)


def test_placeholders_are_neither_matched_nor_drafted():
    target = llava()
    one = prompt(target, 1, 5, images=1)
    drafter = PromptLookupDrafter(Config(1, 1, 4))
    drafter.open(1, 64)
    text = [int(t) for t, v in zip(one.input_ids, one.visual) if not v]
    drafter.admit(0, Request("r", one, 9), None, torch.tensor(text[0]))
    drafted = drafter.propose(torch.tensor([text[0]]), Plan(4, (4,))).tokens[0, 1:].tolist()
    assert target.image_token_id not in drafted
    drafter.admit(0, Request("r", one, 9), None, torch.tensor(target.image_token_id))
    drafter.rows[0].stream[-1] = -1
    assert drafter.propose(torch.tensor([target.image_token_id]), Plan(4, (4,))).tokens.shape == (1, 1)


def test_rows_with_and_without_a_match_share_a_batch():
    drafter = PromptLookupDrafter(Config(2, 1, 3))
    drafter.open(3, 64)
    for row, stream in enumerate(([5, 6, 7, 8, 5], [1, 2, 3], [9, 4, 9])):
        drafter.rows[row] = NGramIndex(drafter.config)
        drafter.rows[row].extend(stream)
    tree = drafter.propose(torch.tensor([5, 3, 9]), Plan(3, (3, 3, 3)))
    assert tree.tokens.tolist() == [[5, 6, 7, 8], [3, 0, 0, 0], [9, 4, 9, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2], [-1, -1, -1, -1], [-1, 0, 1, -1]]
    assert drafter.propose(torch.tensor([5, 3, 9]), Plan(3, (1, 3, 0))).tokens.tolist() == [[5, 6], [3, 0], [9, 0]]


def test_a_prompt_that_repeats_itself_is_drafted_from():
    target = llava()
    requests = [Request("r", prompt(target, 2, 6, images=1), 40)]
    output = generate(target, requests, PromptLookupDrafter(), FixedPolicy(10, 10), GreedySampler())[0]
    assert {nodes for _, nodes, _, _ in output.rounds} - {0}, "nothing was ever drafted"
    assert all(accepted <= nodes for _, nodes, accepted, _ in output.rounds)


@pytest.mark.parametrize("share", [False, True])
def test_answers_are_left_to_later_requests_only_when_told_to(share):
    """Prompts are not: they may be confidential, and an answer is what repeats."""
    drafter = PromptLookupDrafter(Config(2, 1, 3, share=share))
    drafter.open(1, 64)
    for prompt_tokens, answer in (([1, 2, 3], [7, 8, 9]), ([4, 5], [7])):
        drafter.rows[0] = drafter.start()
        drafter.rows[0].begin(prompt_tokens)
        drafter.rows[0].extend(answer)
        drafted = drafter.rows[0].draft(3, 3)[0]
        drafter.evict(0)
    assert drafted == ([8, 9] if share else [])
    drafter.rows[0] = drafter.start()
    drafter.rows[0].begin([6])
    drafter.rows[0].extend([2])
    assert drafter.rows[0].draft(3, 3)[0] == [], "2 stood in a prompt"


def test_earlier_answers_are_kept_up_to_a_limit_the_latest_ones_longest():
    drafter = PromptLookupDrafter(Config(2, 2, 1, share=True, max_shared=40))
    for start in range(0, 3000, 3):
        drafter.shared.add([start, start + 1, start + 2])
        assert sum(len(index.stream) for index in drafter.shared.kept) <= 40 + 2 * 4
    for start, wanted in ((2997, [2999]), (2997 - 3 * 4, [2989 - 2]), (0, [])):
        stream = drafter.start()
        stream.begin([start])
        stream.extend([start + 1])
        assert stream.draft(1, 1)[0] == wanted, start


def test_the_own_text_comes_first_where_both_know_as_much():
    drafter = PromptLookupDrafter(Config(2, 1, 2, share=True))
    drafter.shared.add([1, 2, 3])
    stream = drafter.start()
    stream.begin([2, 9])
    stream.extend([2])
    assert stream.draft(2, 2)[0] == [9, 2]
    stream.extend([1, 2])
    assert stream.draft(2, 2)[0] == [3], "a longer n-gram is better known, wherever it is"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_ngram": 1, "min_ngram": 2}, "got 2 and 1"),
        ({"num_pred": 0}, "got 0"),
        ({"prefer": "last"}, "'last'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Config(**settings)
