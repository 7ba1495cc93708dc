"""Trie lookahead: counters and drafts against a scan of the text, and each known defect of earlier implementations."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.drafters.lookahead import Config, CountedStream, LookaheadDrafter, Trie
from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.types import Plan, Prompt, Request
from mmspec.verify import MatchVerifier
from tests.drafters import Erratic
from tests.tiny import VOCAB, llava, prompt

PIECES = st.lists(st.lists(st.integers(-1, 3), max_size=7), max_size=6)


def fed(config, pieces):
    """A stream of a prompt and rounds of an answer, and the two texts."""
    stream, (prompt, *rounds) = CountedStream(config), [*pieces, [0]]
    stream.begin(prompt)
    for piece in rounds:
        stream.extend(piece)
    return stream, prompt, [token for piece in rounds for token in piece]


def occurrences(text, longest):
    """{run: how often it occurs}, by looking at every position; runs with a gap are none."""
    found = {}
    for start in range(len(text)):
        for end in range(start + 1, min(start + longest, len(text)) + 1):
            run = tuple(text[start:end])
            if min(run) >= 0:
                found[run] = found.get(run, 0) + 1
    return found


def counted(trie):
    """The same of a trie."""
    found, below = {}, [((first,), node) for first, node in trie.roots.items()]
    while below:
        run, node = below.pop()
        found[run] = node.count
        below += [((*run, token), longer) for token, longer in node.items()]
    return found


def paths(draft):
    """Each drafted node as the tokens that lead to it."""
    lines = [()]
    for token, parent in zip(*draft):
        lines.append((*lines[parent], token))
    return lines[1:]


@given(PIECES, st.integers(1, 4))
@settings(deadline=None)
def test_counters_are_what_a_scan_counts(pieces, branch_length):
    stream, before, answer = fed(Config(branch_length=branch_length, max_query=1), pieces)
    for trie, text in ((stream.prompt, before), (stream.answers, answer)):
        found = occurrences(text, branch_length + 1)
        assert counted(trie) == found
        for first, size in trie.sizes.items():
            assert size == sum(run[0] == first and len(run) > 1 for run in found)


@given(PIECES, st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
@settings(max_examples=200, deadline=None)
def test_the_draft_is_the_heaviest_of_what_followed(pieces, depth, budget, weight):
    """Against a scan: the best `budget` weights of all runs behind the newest two tokens, or the newest one."""
    stream, before, answer = fed(Config(branch_length=4, output_weight=weight), pieces)
    draft = stream.draft(depth, budget)
    prompts, answers = occurrences(before, 5), occurrences(answer, 5)
    newest = (before + answer)[-2:]
    for query in (tuple(newest), tuple(newest[-1:])):
        n = len(query)
        below = {
            run[n:]: (1 - weight) * prompts.get(run, 0) + weight * answers.get(run, 0)
            for run in {**prompts, **answers}
            if run[:n] == query and n < len(run) <= n + depth
        }
        if len(below) >= min(depth, budget):
            break
    drafted = paths(draft)
    assert len(set(drafted)) == len(drafted), "siblings have distinct tokens"
    best = sorted(below.values(), reverse=True)[:budget]
    assert sorted((below[line] for line in drafted), reverse=True) == pytest.approx(best)


def test_among_equals_a_branch_is_drafted_to_its_end():
    stream = CountedStream(Config())
    stream.begin([1, 2, 3, 4, 1, 5, 6, 7, -1])
    stream.extend([1])
    # Behind 1: 2 3 4 1 5 6 7, and 5 6 7; both once.
    assert paths(stream.draft(3, 4)) == [(2,), (2, 3), (2, 3, 4), (5,)]


def test_the_newest_tokens_alone_are_looked_up():
    """Defect: the whole sequence was looked up, from its first token on, n tries a step."""
    short, long = CountedStream(Config()), CountedStream(Config())
    short.begin([1, 2, 3, 4, 5, 6, 9, 1])
    long.begin([*range(20, 400), 1, 2, 3, 4, 5, 6, 9, 1])
    for stream in (short, long):
        stream.extend([2])
    assert short.draft(3, 8) == long.draft(3, 8)
    assert paths(short.draft(3, 8)) == [(3,), (3, 4), (3, 4, 5)]


def two_branches():
    """The tree of a row in which 1 was followed by 2 3 and by 4 5."""
    drafter = LookaheadDrafter(Config(branch_length=2, decoding_length=4))
    drafter.open(1, 64)
    drafter.rows[0] = drafter.start()
    drafter.rows[0].begin([1, 2, 3, 1, 4, 5, -1])
    drafter.rows[0].extend([1])
    tree = drafter.propose(torch.tensor([1]), Plan(2, (4,)))
    assert tree.tokens.tolist() == [[1, 2, 3, 4, 5]]
    assert tree.parents.tolist() == [[-1, 0, 1, 0, 3]]
    return tree


@pytest.mark.parametrize(
    ("choices", "path", "bonus"),
    [
        ([4, 9, 9, 5, 6], [0, 3, 4], 6),  # the second branch
        ([2, 3, 4, 5, 6], [0, 1, 2], 4),  # the first to its leaf; what comes next in the list hangs elsewhere
    ],
)
def test_the_draft_is_verified_as_a_tree(choices, path, bonus):
    """Defect: the depth-first list was verified as a chain: no branch but the first, and over leaves."""
    tree = two_branches()
    scores = torch.nn.functional.one_hot(torch.tensor([choices]), 10).double()
    accepted = MatchVerifier().accept(tree, scores)
    assert accepted.path[0, : int(accepted.n_kept)].tolist() == path
    assert accepted.next_tokens.tolist() == [bonus]


def request(ids, visual=()):
    mask = torch.zeros(len(ids), dtype=torch.bool)
    mask[list(visual)] = True
    return Request("r", Prompt(torch.tensor(ids), mask), 9)


def drafted_after(drafter, ids, root, visual=()):
    """Paths drafted directly after a prompt."""
    drafter.admit(0, request(ids, visual), None, torch.tensor(root))
    return paths(drafter.rows[0].draft(12, 64))


@pytest.mark.parametrize("share", [False, True])
def test_a_prompt_is_forgotten_with_its_request(share):
    """Defect: input counters were never cleared and leaked into later requests."""
    drafter = LookaheadDrafter(Config(share=share))
    drafter.open(1, 64)
    assert drafted_after(drafter, [1, 2, 3, 4], 1)
    drafter.rows[0].extend([7, 8, 7])
    drafter.evict(0)
    assert drafted_after(drafter, [5, 6], 1) == ([(7,), (7, 8), (7, 8, 7)] if share else [])
    drafter.evict(0)
    drafter.open(1, 64)
    assert bool(drafted_after(drafter, [5, 6], 8)) == share, "a shared trie outlives a run"


def test_rows_of_a_batch_share_answers_only():
    drafter = LookaheadDrafter(Config(share=True))
    drafter.open(2, 64)
    drafter.admit(0, request([1, 2]), None, torch.tensor(1))
    drafter.admit(1, request([3, 4]), None, torch.tensor(1))
    drafter.rows[1].extend([6])
    assert paths(drafter.rows[0].draft(12, 64)) == [(2,), (6,)], "the own prompt before anybody's answer"
    drafter.rows[1].extend([1])
    assert paths(drafter.rows[1].draft(12, 64)) == [(6,), (6, 1)]


def test_no_token_ends_a_text():
    """Defect: id 2, one family's end of sequence, cut the text of all; where to stop is the loop's business."""
    stream = CountedStream(Config())
    stream.begin([1, 2, 3, 4])
    stream.extend([1])
    assert paths(stream.draft(3, 3)) == [(2,), (2, 3), (2, 3, 4)]


def test_images_are_gaps():
    target = llava()
    image = target.image_token_id
    drafter = LookaheadDrafter(Config(max_query=2))
    drafter.open(1, 64)
    drafted = drafted_after(drafter, [5, 6, image, image, 7, 5, 8], 6, visual=(2, 3))
    assert drafted == [], "nothing followed 6 but an image"
    drafter.evict(0)
    assert drafted_after(drafter, [5, 6, image, image, 7, 5, 8], 5, visual=(2, 3)) == [(6,), (8,)]
    drafter.evict(0)
    assert drafted_after(drafter, [image, image, 7, 5, 7], image, visual=(0, 1)) == []


def test_a_full_trie_halves_its_counts():
    trie, runs = Trie(max_nodes=5), deque(maxlen=2)
    for token in [1, 2, 3, 1, 2, 3, 1, 4, 9, 1, 5]:
        trie.add(runs, token)
    assert trie.sizes[1] == 5  # 2, 2 3, 4, 4 9, 5
    trie.add(runs, 6)
    assert {run: n for run, n in counted(trie).items() if run[0] == 1 and len(run) > 1} == {(1, 2): 1, (1, 2, 3): 1}
    assert trie.sizes[1] == 2
    for token in [1, 2, 3]:
        trie.add(runs, token)
    assert trie.find([1, 2, 3]).count == 2, "it goes on counting"


def test_shared_counts_are_bounded_between_requests():
    drafter = LookaheadDrafter(Config(share=True, max_output_nodes=30))
    drafter.open(1, 64)
    for start in range(5):
        drafter.admit(0, request([1, 2]), None, torch.tensor(3))
        drafter.rows[0].extend([token for i in range(9) for token in (3, 10 + start, 20 + i)])
        drafter.evict(0)
        assert max(drafter.shared.sizes.values()) <= 30


def requests(target, n=6, new=24):
    """More than a batch, ragged; each prompt says its words twice, so there is something to find."""
    wanted = []
    for i in range(n):
        one = prompt(target, i, 4 + i % 3, images=i % 3)
        twice = Prompt(
            torch.cat([one.input_ids, one.input_ids[~one.visual]]),
            torch.cat([one.visual, torch.zeros(int((~one.visual).sum()), dtype=torch.bool)]),
            one.pixels,
        )
        wanted.append(Request(f"r{i}", twice, new - i % 4, key=17 * i))
    return wanted


@pytest.mark.parametrize("sampler", [GreedySampler(), KeyedSampler(0.8, top_p=0.9, seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("share", [False, True])
def test_the_output_is_plain_decodings(sampler, share):
    """Also sampled: the temperature was ignored once, and the draft verified greedily."""
    target = llava()
    wanted = requests(target)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), sampler)
    config = Config(decoding_length=9, branch_length=4, share=share)
    drafter = LookaheadDrafter(config)
    for policy in (FixedPolicy(config.depth, config.budget), Erratic(config.depth, config.budget)):
        for batch in (1, 3):
            got = generate(target, wanted, drafter, policy, sampler, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain]
            assert not any(o.error for o in got)
            assert sum(nodes for o in got for _, nodes, _, _ in o.rounds), "nothing was ever drafted"


def test_no_placeholder_is_ever_drafted():
    target = llava()
    drafter = LookaheadDrafter(Config(decoding_length=9, branch_length=4))
    seen = []
    propose = drafter.propose
    drafter.propose = lambda roots, plan: seen.append(propose(roots, plan)) or seen[-1]
    generate(target, requests(target), drafter, FixedPolicy(4, 9), GreedySampler(), max_batch=3)
    drafted = torch.cat([tree.tokens[tree.parents >= 0] for tree in seen])
    emitted = drafted[drafted < VOCAB]
    assert len(emitted) == len(drafted) > 0
    assert target.image_token_id not in drafted.tolist()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"decoding_length": 0}, "decoding_length must be at least 1, got 0"),
        ({"branch_length": 0}, "branch_length must be at least 1, got 0"),
        ({"max_query": 4, "branch_length": 2}, "max_query 4 .* = 3"),
        ({"output_weight": 1.5}, "got 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, said):
    with pytest.raises(ValueError, match=said):
        Config(**config)
