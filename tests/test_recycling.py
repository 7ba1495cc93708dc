"""Token Recycling: matrix and trees against a slow reference, and none of the known ways to do it wrong."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmspec.drafters.null import NullDrafter
from mmspec.drafters.recycling import Config, RecyclingDrafter, make
from mmspec.loop import generate
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.static_tree import TOKEN_RECYCLING_80, StaticTree
from mmspec.tree import from_parents
from mmspec.types import Accepted, Forward, InputError, Plan, Request, Round
from tests.drafters import Erratic
from tests.test_static_tree import paths_of
from tests.tiny import VOCAB, llava, prompt

K = 8


class Slow:
    """One row's matrix as a dictionary; every node by hand."""

    def __init__(self, image_token_id):
        self.successors, self.image = {}, image_token_id

    def learn(self, tokens, parents, logits):
        for i, token in enumerate(tokens):
            if i == 0 or parents[i] >= 0:
                ranked = sorted(range(len(logits[i])), key=lambda t: -logits[i][t])
                self.successors[token] = [None if t == self.image else t for t in ranked[:K]]

    def fill(self, root, paths):
        tokens = {(): root}
        for path in sorted(paths, key=len):
            above = tokens.get(path[:-1])
            tokens[path] = self.successors.get(above, [None] * K)[path[-1]]
        return {tuple(tokens[path[:n]] for n in range(len(path) + 1)) for path in tokens if tokens[path] is not None}


def a_round(tokens, parents, logits, active):
    """What the loop tells of rows: all a drafter reads of acceptance is whether a row goes on."""
    trees = from_parents(tokens, parents, 8)
    zeros = torch.zeros((len(tokens), 1), dtype=torch.long)
    kept = tuple((0,) if on else () for on in active)
    return Round(trees, Forward(logits, logits), Accepted(zeros, zeros[:, 0] + 1, zeros[:, 0]), kept, kept)


@st.composite
def rounds(draw):
    """Trees of few different tokens, so that the same one occurs often, with padding and idle rows."""
    n, B = draw(st.integers(1, 7)), 2
    tokens = [[draw(st.integers(0, 5)) for _ in range(n)] for _ in range(B)]
    parents = [[-1] + [draw(st.integers(-1, i - 1)) for i in range(1, n)] for _ in range(B)]
    return tokens, parents, draw(st.tuples(st.booleans(), st.booleans())), draw(st.integers(0, 2**31))


@given(
    st.lists(rounds(), min_size=1, max_size=5),
    st.tuples(st.integers(0, 80), st.integers(1, 80)),
    st.integers(1, 7),
    st.integers(0, 5),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_matrix_and_trees_are_those_of_a_slow_reference(taught, budget, depth, root, persist):
    target = llava()
    drafter = RecyclingDrafter(Config(persist=persist), target)
    drafter.open(2, 64)
    slow = [Slow(target.image_token_id) for _ in range(1 if persist else 2)] * (2 if persist else 1)
    for tokens, parents, active, seed in taught:
        logits = torch.randn((2, len(tokens[0]), VOCAB), generator=torch.Generator().manual_seed(seed))
        logits[..., :6] += 2.0  # few tokens have successors: they should follow each other
        drafter.observe(a_round(torch.tensor(tokens), torch.tensor(parents), logits, active))
        for row in range(2):
            if active[row]:
                slow[row].learn(tokens[row], parents[row], logits[row].tolist())
    trees = drafter.propose(torch.tensor([root, root]), Plan(depth, budget))
    paths = [path for path in TOKEN_RECYCLING_80.paths if len(path) <= depth]
    for row in range(2):
        assert paths_of(trees, row) == slow[row].fill(root, paths[: budget[row]])
        for node in range(trees.tokens.shape[1]):
            line = [i for i in range(trees.tokens.shape[1]) if trees.ancestors[row, node, i]]
            if node == 0 or trees.parents[row, node] >= 0:
                assert len(line) == int(trees.depths[row, node]) + 1


def taught(config=None, rows=1):
    """A drafter that knows successors of every token."""
    drafter = RecyclingDrafter(config or Config(), llava())
    drafter.open(rows, 64)
    tokens = torch.arange(VOCAB).expand(rows, -1)
    logits = torch.randn((rows, VOCAB, VOCAB), generator=torch.Generator().manual_seed(1))
    drafter.observe(a_round(tokens, torch.zeros_like(tokens), logits, [True] * rows))
    return drafter, logits


def test_of_a_token_that_occurs_twice_the_deepest_node_counts():
    drafter = RecyclingDrafter(Config(), llava())
    drafter.open(1, 64)
    tokens, parents = torch.tensor([[4, 7, 4, 7, 7, 9]]), torch.tensor([[-1, 0, 1, 2, -1, 1]])  # the last 7 is padding
    logits = torch.randn((1, 6, VOCAB), generator=torch.Generator().manual_seed(2))
    drafter.observe(a_round(tokens, parents, logits, [True]))
    best = logits.topk(8).indices[0]
    image = llava().image_token_id
    for token, node in ((4, 2), (7, 3), (9, 5)):
        assert drafter.matrix[0, token].tolist() == [t if t != image else -1 for t in best[node].tolist()]
    assert int((drafter.matrix >= 0).any(-1).sum()) == 3, "something else was written"


def test_the_draft_is_a_tree_of_eighty_nodes_not_a_chain():
    drafter, _ = taught()
    trees = drafter.propose(torch.tensor([11]), Plan(6, (80,)))
    children = (trees.parents[0] == 0).sum()
    assert children in (7, 8)  # one of them may have been an image
    assert trees.tokens.shape[1] > 60
    assert int(trees.depths.max()) == 6


def test_siblings_are_distinct_and_images_are_never_drafted():
    drafter = RecyclingDrafter(Config(), llava())
    image = drafter.target.image_token_id
    drafter.open(1, 64)
    tokens = torch.arange(VOCAB).unsqueeze(0)
    logits = torch.randn((1, VOCAB, VOCAB), generator=torch.Generator().manual_seed(3))
    logits[..., image] = 9.0  # the target would like nothing better
    drafter.observe(a_round(tokens, torch.zeros_like(tokens), logits, [True]))
    assert not (drafter.matrix == image).any()
    trees = drafter.propose(torch.tensor([11]), Plan(6, (80,)))
    drafted = trees.parents[0] >= 0
    assert int(drafted.sum()) > 10
    assert image not in trees.tokens[0, drafted].tolist()
    pairs = list(zip(trees.parents[0, drafted].tolist(), trees.tokens[0, drafted].tolist()))
    assert len(pairs) == len(set(pairs))


def test_each_request_starts_empty_unless_the_matrix_persists():
    target = llava()
    request = Request("r", prompt(target, 1, 5), 4)
    for persist in (False, True):
        drafter, _ = taught(Config(persist=persist, seed_prompt=False), rows=2)
        known = drafter.matrix[-1].clone()
        drafter.admit(0, request, None, torch.tensor(5))
        assert bool((drafter.matrix[0] == -1).all()) == (not persist)
        assert torch.equal(drafter.matrix[-1], known)
        drafter.open(2, 64)  # as every call of the loop does
        assert bool((drafter.matrix == -1).all()) == (not persist)


def test_a_shared_matrix_takes_nothing_from_idle_rows():
    drafter = RecyclingDrafter(Config(persist=True), llava())
    drafter.open(2, 64)
    logits = torch.randn((2, 1, VOCAB), generator=torch.Generator().manual_seed(4))
    drafter.observe(a_round(torch.tensor([[5], [6]]), torch.tensor([[-1], [-1]]), logits, [False, True]))
    assert (drafter.matrix[0, :, 0] >= 0).nonzero().flatten().tolist() == [6]
    drafter.observe(a_round(torch.tensor([[5], [7]]), torch.tensor([[-1], [-1]]), logits, [False, False]))
    assert (drafter.matrix[0, :, 0] >= 0).nonzero().flatten().tolist() == [6]


def test_the_prompt_fills_the_matrix():
    """What its text would be followed by, of each token the last occurrence; placeholders leave no trace."""
    target = llava()
    one = prompt(target, 2, 150, images=2)  # more than a chunk
    state = target.open(1, 256)
    with torch.inference_mode():
        forward = target.prefill(state, 0, one)
        logits = target.unembed(forward.last_hidden)[0]
    drafter = RecyclingDrafter(Config(), target)
    drafter.open(1, 256)
    drafter.admit(0, Request("r", one, 4), forward, torch.tensor(5))
    last = {int(t): i for i, (t, image) in enumerate(zip(one.input_ids, one.visual)) if not image}
    assert (drafter.matrix[0] >= 0).any(-1).nonzero().flatten().tolist() == sorted(last)
    for token, position in last.items():
        best = [t if t != target.image_token_id else -1 for t in logits[position].topk(8).indices.tolist()]
        assert drafter.matrix[0, token].tolist() == best


SAMPLERS = {"greedy": GreedySampler(), "sampled": KeyedSampler(0.8, top_p=0.9, seed=3)}
SETTINGS = {"reset": Config(), "persist": Config(persist=True), "unseeded": Config(seed_prompt=False)}


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_text_is_plain_decodings(sampler, setting):
    """Also where the target repeats itself: nothing of what it decided is ever replaced to break a cycle."""
    target, draw = llava(), SAMPLERS[sampler]
    wanted = [Request(f"r{i}", prompt(target, i, 3 + i, images=i % 2), 50, i) for i in range(5)]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), draw)
    drafter = make(SETTINGS[setting], target)
    accepted = 0
    for batch in (1, 3):
        for policy in (FixedPolicy(6, 80), FixedPolicy(3, 10), Erratic(6, 30)):
            got = generate(target, wanted, drafter, policy, draw, max_batch=batch)
            assert [o.tokens for o in got] == [o.tokens for o in plain]
            assert not any(o.error for o in got)
            accepted += sum(n for o in got for _, _, n, _ in o.rounds)
    assert accepted > 20


def test_what_is_drafted_is_the_same_every_time():
    target = llava()
    wanted = [Request(f"r{i}", prompt(target, i, 5), 40, i) for i in range(3)]
    runs = [generate(target, wanted, make(Config(), target), FixedPolicy(6, 80), GreedySampler(), 3) for _ in range(2)]
    alone = generate(target, wanted, make(Config(), target), FixedPolicy(6, 80), GreedySampler(), 1)
    assert [o.rounds for o in runs[0]] == [o.rounds for o in runs[1]]
    # How deep a last round drafts depends on who else is decoded.
    assert [o.rounds[:-1] for o in runs[0]] == [o.rounds[:-1] for o in alone]


def test_a_fitted_tree_is_used(tmp_path):
    file = tmp_path / "tree.json"
    file.write_text(json.dumps({"paths": [[0], [1], [0, 0]]}))
    config = Config(k=2, tree=str(file))
    assert (config.depth, config.budget) == (2, 3)
    drafter, logits = taught(config)
    trees = drafter.propose(torch.tensor([11]), Plan(config.depth, (config.budget,)))
    first = logits[0, 11].topk(2).indices.tolist()
    below = int(logits[0, first[0]].argmax())
    assert trees.tokens.tolist() == [[11, *first, below]]
    assert config.shape == StaticTree.load(file)


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        Config(k=0)
    with pytest.raises(ValueError, match="asks for 8 successors of a token, but k is 4"):
        Config(k=4)
    with pytest.raises(InputError, match="cannot be read"):
        Config(tree=str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="exceeds the vocabulary of 61"):
        make(Config(k=62), llava())
