"""Hybrid: each row has the tree of one drafter, and whichever it is, the text is plain decoding's."""

from __future__ import annotations

import pytest
import torch

from mmspec.drafters.hybrid import HybridDrafter
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.pld import Config, NGramIndex, PromptLookupDrafter
from mmspec.heads import eagle
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import make_sampler
from mmspec.tree import chain, from_parents, padded
from mmspec.types import Plan, Request
from tests.drafters import Erratic
from tests.tiny import llava, prompt


def head_of(target, width=3):
    torch.manual_seed(1)
    return eagle.Head(eagle.Config().resolve(target.shape)).double().drafter(target, width)


def hybrid(target, min_match, head=None, num_pred=40):
    lookup = PromptLookupDrafter(Config(max_ngram=8, num_pred=num_pred))
    return HybridDrafter(lookup, head or head_of(target), depth=3, budget=6, min_match=min_match)


class Noting(HybridDrafter):
    """Notes which rows copied in each round."""

    def open(self, max_batch, max_tokens):
        super().open(max_batch, max_tokens)
        self.copied = []

    def propose(self, roots, plan):
        self.copied.append([m >= self.min_match for m, n in zip(self.retrieval.matches(), plan.budget) if n])
        return super().propose(roots, plan)


def requests(target):
    """Prompts that repeat themselves and prompts that do not, with and without images, of different lengths."""
    wanted = []
    for i in range(6):
        words = " ".join(["w1 w2 w3 w4"] * 4) if i % 2 else " ".join(f"w{(5 * i + 7 * j) % 50}" for j in range(6 + i))
        content = [{"type": "text", "text": words}]
        one = target.encode([{"role": "user", "content": content}], []) if i < 4 else prompt(target, i, 7 + i)
        wanted.append(Request(str(i), one, 30 + 5 * i, i))
    return wanted


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("min_match", [1, 2])
def test_the_text_is_plain_decodings_whichever_drafts(batch, temperature, min_match):
    target, sampler = llava(), make_sampler(temperature, seed=3)
    wanted = requests(target)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), sampler)
    drafter = Noting(PromptLookupDrafter(Config(8, 1, 40)), head_of(target), 3, 6, min_match)
    got = generate(target, wanted, drafter, FixedPolicy(40, 40), sampler, max_batch=batch)
    assert [o.tokens for o in got] == [o.tokens for o in plain]
    assert not any(o.error for o in got)
    kinds = {copies for round in drafter.copied for copies in round}
    assert kinds == {True, False}, "one of the two never drafted"
    if batch > 1:
        assert any(len(set(round)) == 2 for round in drafter.copied), "no batch held a row of each kind"
    again = generate(target, wanted, drafter, Erratic(40, 40), sampler, max_batch=batch)
    assert [o.tokens for o in again] == [o.tokens for o in plain]


def test_a_head_that_waited_drafts_what_it_would_have_drafted():
    """Rounds that a row copied in are rounds that the head was skipped in: its later trees must not know."""
    target = llava()
    plain = generate(target, requests(target), NullDrafter(), SkipPolicy(), make_sampler(0.0))
    seen = {}
    for name, min_match in (("mixed", 2), ("head", 99)):
        drafter, trees = hybrid(target, min_match), []
        propose = drafter.head.propose

        def note(roots, plan, propose=propose, trees=trees, drafter=drafter):
            tree = propose(roots, plan)
            trees.append(
                (len(drafter.retrieval.rows[0].stream), plan.depth, tree.tokens.tolist(), tree.parents.tolist())
            )
            return tree

        drafter.head.propose = note
        got = generate(target, requests(target)[1:2], drafter, FixedPolicy(40, 40), make_sampler(0.0))
        assert got[0].tokens == plain[1].tokens
        seen[name] = {(length, depth): rest for length, depth, *rest in trees}
    both = seen["mixed"].keys() & seen["head"].keys()
    assert both, "no context that both drafted at"
    assert all(seen["mixed"][key] == seen["head"][key] for key in both)


def rows_of(drafter, streams):
    drafter.retrieval.open(len(streams), 64)
    for row, stream in enumerate(streams):
        drafter.retrieval.rows[row] = NGramIndex(drafter.retrieval.config)
        drafter.retrieval.rows[row].extend(stream)


class Fan(NullDrafter):
    """Two children of the root and a grandchild; keeps the plans it was given."""

    taps = (1,)

    def __init__(self):
        self.plans = []

    def propose(self, roots, plan):
        self.plans.append(plan)
        tokens = torch.cat([roots[:, None], torch.tensor([[50, 51, 52]]).expand(len(roots), -1)], 1)
        parents = torch.tensor([[-1, 0, 0, 1] if n else [-1] * 4 for n in plan.budget])
        return from_parents(tokens, parents, 2)


def test_trees_are_joined_by_row_and_each_drafter_gets_its_own_plan():
    fan = Fan()
    drafter = hybrid(None, 3, fan, num_pred=2)
    rows_of(drafter, [[1, 2, 3, 4, 5, 1, 2, 3], [7, 8, 9], [6, 2, 6], [4, 5]])
    assert drafter.taps == fan.taps
    assert drafter.retrieval.matches() == [3, 0, 1, 0]
    roots = torch.tensor([3, 9, 6, 5])
    tree = drafter.propose(roots, Plan(8, (8, 8, 4, 0)))
    assert fan.plans == [Plan(3, (0, 6, 4, 0))]
    assert tree.tokens.tolist() == [[3, 4, 5, 0], [9, 50, 51, 52], [6, 50, 51, 52], [5, 50, 51, 52]]
    assert tree.parents.tolist() == [[-1, 0, 1, -1], [-1, 0, 0, 1], [-1, 0, 0, 1], [-1, -1, -1, -1]]
    again = from_parents(tree.tokens, tree.parents, 2)
    assert tree.depths.equal(again.depths)
    assert tree.ancestors.equal(again.ancestors)
    assert tree.max_depth == 2
    copied = drafter.propose(roots, Plan(8, (8, 0, 0, 0)))
    assert copied.tokens.tolist() == [[3, 4, 5], [9, 0, 0], [6, 0, 0], [5, 0, 0]]
    assert len(fan.plans) == 1, "the head is not asked where every row copies"


def test_a_row_whose_copy_would_begin_with_an_image_is_left_to_the_head():
    fan = Fan()
    drafter = hybrid(None, 2, fan)
    rows_of(drafter, [[1, 2, -1, 3, 1, 2]])
    assert drafter.retrieval.matches() == [0]
    drafter.propose(torch.tensor([2]), Plan(4, (4,)))
    assert fan.plans == [Plan(3, (4,))]


def test_padding_keeps_a_tree_what_it_was():
    line = chain(torch.tensor([[3, 4, 5]]))
    wide = padded(line, 5)
    again = from_parents(torch.tensor([[3, 4, 5, 0, 0]]), torch.tensor([[-1, 0, 1, -1, -1]]), 2)
    assert wide.tokens.equal(again.tokens)
    assert wide.parents.equal(again.parents)
    assert wide.depths.equal(again.depths)
    assert wide.ancestors.equal(again.ancestors)
    assert padded(line, 3) is line
