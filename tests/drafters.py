"""Drafters and policies for contracts: one that knows the answer, one that is always wrong, random trees, heads."""

from __future__ import annotations

import random

import torch

from mmspec.drafters import lade, recycling
from mmspec.drafters.hybrid import HybridDrafter
from mmspec.drafters.lade import LadeDrafter
from mmspec.drafters.lookahead import LookaheadDrafter
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.pld import PromptLookupDrafter
from mmspec.drafters.recycling import RecyclingDrafter
from mmspec.drafters.sam import SamDrafter
from mmspec.heads import medusa
from mmspec.heads._unrolled import UnrolledHead
from mmspec.losses import LossConfig
from mmspec.policy import FixedPolicy
from mmspec.recipe import head_kinds, import_head
from mmspec.static_tree import MEDUSA_63, StaticTree
from mmspec.tree import from_parents, pruned
from mmspec.types import Plan

DRAFT_VOCAB = 40
"""Of the 61 tokens of the random targets."""


def variant(kind, **settings):
    """A head of `mmspec/heads/<kind>.py` as (target, loss) -> head."""

    def make(target, loss=None):
        module = import_head(kind)
        return module.Head(module.Config(**settings).resolve(target.shape), loss)

    return make


def eagle3_small_head(target, loss=None):
    """With a vocabulary of its own, whose ids are not their places in it."""
    head = variant("eagle3", draft_vocab_size=DRAFT_VOCAB)(target, loss)
    rng = torch.Generator().manual_seed(7)
    head.prepare(target, lambda: torch.rand(target.shape.vocab_size, generator=rng))
    return head


def medusa_head(target, loss=None, **config):
    """Beyond its beginning, where it is the identity."""
    n_ahead = loss.steps if loss else 4
    head = medusa.Head(medusa.Config(n_ahead=n_ahead, **config).resolve(target.shape), loss)
    for parameter in head.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    head.prepare(target, None)
    return head


def medusa_own_head(target, loss=None):
    """With unembeddings of its own, in the depth of two blocks."""
    return medusa_head(target, loss, own_head=True, n_blocks=2)


HEADS = {
    **{kind: variant(kind) for kind in head_kinds() if issubclass(import_head(kind).Head, UnrolledHead)},
    "eagle3": variant("eagle3", taps=(1, 2, 0)),
    "eagle3_small": eagle3_small_head,
}
"""Every head over pairs on a random target, fp32, untrained; with its own whole vocabulary where nothing is said."""
ALL_HEADS = {**HEADS, "medusa": medusa_head, "medusa_own": medusa_own_head}
"""Every trained drafter."""


def make_head(kind, target, seed=1, steps=4):
    """One of ALL_HEADS where the target is, in its dtype."""
    torch.manual_seed(seed)
    return ALL_HEADS[kind](target, LossConfig(steps=steps)).to(target.device, target.dtype)


class Scripted:
    """Drafts from known continuations: `twist` turns the true next token into what is proposed.

    Args:
        truth: {prompt ids as a tuple: the tokens plain decoding gives}.
        twist: (true token, draft level) -> proposed token.
        vocab: siblings of the proposed token are drawn below it.
        width: siblings per level.
    """

    taps = ()

    def __init__(self, truth, twist, vocab, width=1):
        self.truth, self.twist, self.vocab, self.width = truth, twist, vocab, width

    def open(self, max_batch, max_tokens):
        self.row = [None] * max_batch

    def admit(self, row, request, forward, root):
        self.row[row] = [tuple(request.prompt.input_ids.tolist()), 0]

    def evict(self, row):
        self.row[row] = None

    def observe(self, round):
        for row, path in enumerate(round.paths):
            if self.row[row]:
                self.row[row][1] += len(path)

    def propose(self, roots, plan):
        tokens, parents = roots[:, None].tolist(), [[-1] for _ in roots]
        for b, state in enumerate(self.row):
            spine = 0
            for depth in range(plan.depth):
                true = 3
                if state:
                    answer = self.truth[state[0]]
                    true = answer[min(state[1] + depth + 1, len(answer) - 1)]
                siblings = [self.twist(true, depth)] + [(true + 5 + j) % self.vocab for j in range(self.width - 1)]
                first = len(tokens[b])
                for token in dict.fromkeys(siblings):
                    tokens[b].append(token)
                    parents[b].append(spine)
                spine = first
        return padded(tokens, parents, plan, roots.device)


class RandomTrees(Scripted):
    """Trees of random shape and random tokens; where the true path is continued, every other time by the true token."""

    def __init__(self, truth, vocab, seed=0):
        super().__init__(truth, None, vocab)
        self.seed = seed

    def open(self, max_batch, max_tokens):
        super().open(max_batch, max_tokens)
        self.rng = random.Random(self.seed)

    def propose(self, roots, plan):
        tokens, parents = roots[:, None].tolist(), [[-1] for _ in roots]
        for line, above, budget, state in zip(tokens, parents, plan.budget, self.row):
            answer, at = (self.truth[state[0]], state[1]) if state else ([], 0)
            depths, right, taken = [0], {0}, {}
            while len(line) <= budget:
                parent = self.rng.choice([i for i, d in enumerate(depths) if d < plan.depth])
                depth, used = depths[parent] + 1, taken.setdefault(parent, set())
                true = answer[at + depth] if parent in right and at + depth < len(answer) else None
                hit = true is not None and true not in used and self.rng.random() < 0.5
                token = true if hit else self.rng.choice([t for t in range(self.vocab) if t not in used and t != true])
                if hit:
                    right.add(len(line))
                used.add(token)
                line.append(token)
                above.append(parent)
                depths.append(depth)
        return padded(tokens, parents, plan, roots.device)


def padded(tokens, parents, plan, device):
    """Rows of one width, nodes beyond a row's budget turned into padding."""
    width = max(map(len, tokens))
    for line, above, budget in zip(tokens, parents, plan.budget):
        above[:] = [p if i <= budget else -1 for i, p in enumerate(above)]
        above += [-1] * (width - len(line))
        line += [0] * (width - len(line))
    return from_parents(*(torch.tensor(x, device=device) for x in (tokens, parents)), max(plan.depth, 1))


class Erratic(FixedPolicy):
    """Skips rounds and rows, ends drafts early and prunes trees at random: nothing of it must ever change a token."""

    def open(self, max_batch, device, sampled=False):
        self.rng = random.Random(0)

    def plan(self, sensed, remaining):
        full = super().plan(sensed, remaining)
        if self.rng.random() < 0.4 or not full.depth:
            return Plan(0, (0,) * len(remaining))
        budget = tuple(self.rng.choice([0, 2, b]) if b else 0 for b in full.budget)
        extend, prune = (self.rng.choice([None, answer]) for answer in (self._extend, self._prune))
        return Plan(self.rng.randint(1, full.depth), budget, extend, prune)

    def _extend(self, level, scores):
        assert scores.shape[0] > 0
        return self.rng.random() < 0.7

    def _prune(self, trees):
        kept = [[self.rng.random() < 0.7 for _ in line] for line in trees.tokens]
        return pruned(trees, torch.tensor(kept, device=trees.tokens.device))


def known_answers(requests, outputs):
    """What `Scripted` drafts from."""
    return {tuple(r.prompt.input_ids.tolist()): o.tokens for r, o in zip(requests, outputs)}


def drafters(target, truth):
    """One of each kind for a target whose plain outputs are known."""
    vocab = target.shape.vocab_size
    rng = random.Random(0)

    def wrong(true, depth):
        return (true + 1) % vocab

    return {
        "null": NullDrafter(),
        "oracle": Scripted(truth, lambda true, depth: true, vocab),
        "adversary": Scripted(truth, wrong, vocab),
        "coin_chain": Scripted(truth, lambda true, depth: true if rng.random() < 0.5 else wrong(true, depth), vocab),
        "half_right_tree": Scripted(
            truth, lambda true, depth: true if depth < 2 else wrong(true, depth), vocab, width=3
        ),
        "random_tree": RandomTrees(truth, vocab),
        "pld": PromptLookupDrafter(),
        "sam": SamDrafter(),
        "lookahead": LookaheadDrafter(),
        "lade": LadeDrafter(lade.Config(4, 3, 2), target),
        "recycling": RecyclingDrafter(recycling.Config(), target),
        **{kind: make_head(kind, target).drafter(target, 3) for kind in ALL_HEADS},
        "medusa_static": make_head("medusa", target).drafter(target, 3, shape=MEDUSA_63),
        "eagle_static": make_head("eagle", target).drafter(target, 3, shape=StaticTree.parse("root:3 0:2 1:1 | 01:2")),
        "eagle_chain": make_head("eagle", target).drafter(target, 1),
        "hybrid": HybridDrafter(
            PromptLookupDrafter(), make_head("eagle", target).drafter(target, 3), 3, 6, min_match=1
        ),
    }
