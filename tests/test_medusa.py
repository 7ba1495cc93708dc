"""Medusa's own: drafting is what was trained, its trees are the best ones; its settings, counts and files."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmspec import checkpoint
from mmspec.api import drafter_and_policy
from mmspec.drafters.null import NullDrafter
from mmspec.heads.medusa import Config, Head
from mmspec.loop import generate
from mmspec.losses import LossConfig
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.static_tree import MEDUSA_63, NAMED
from mmspec.tree import best_products
from mmspec.types import Features, InputError, Plan, Prompt, Request
from mmspec.verify import RejectionVerifier
from scripts import fit_tree
from tests import families
from tests.contract.test_heads import dialogue, taught
from tests.drafters import make_head
from tests.tiny import llava, prompt
from train import memory
from train.flops import counted, head_cost, is_counted
from train.memory import Batch
from train.shapes import TargetFacts

KINDS = ("medusa", "medusa_own")
every_kind = pytest.mark.parametrize("kind", KINDS)


# ---- training and drafting ----


def recorded(drafter: Any) -> list[tuple[list[int], list[int], torch.Tensor]]:
    """What a drafter sees in all rounds to come: committed lengths, request keys and logits [B, K, V]."""
    seen: list[tuple[list[int], list[int], torch.Tensor]] = []
    scored = drafter._scored

    def note(logits: torch.Tensor) -> torch.Tensor:
        seen.append((list(drafter.lengths), drafter.keys.tolist(), logits.clone()))
        return scored(logits)

    drafter._scored = note
    return seen


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [1, 4])
@every_kind
def test_teacher_forced_logits_equal_drafting_logits(kind: str, family: str, batch: int):
    """In the loop, over ragged rows with no, one and two images that end and are refilled (fp64, 1e-9)."""
    target = families.build(family)
    head = make_head(kind, target)
    wanted = families.requests(target, 6, 12)
    drafter = head.drafter(target, 3)
    seen = recorded(drafter)
    outputs = generate(target, wanted, drafter, FixedPolicy(4, 9), GreedySampler(), max_batch=batch)
    truth = {}
    for request, output in zip(wanted, outputs):
        extra = torch.zeros(len(output.tokens), dtype=torch.bool)
        whole = Prompt(
            torch.cat([request.prompt.input_ids, torch.tensor(output.tokens)]),
            torch.cat([request.prompt.visual, extra]),
            request.prompt.pixels,
        )
        features = target.teacher([whole], [torch.ones(len(whole), dtype=torch.long)], head.taps)
        with torch.no_grad():
            packed, states = head.unroll(features, 4)
            logits = torch.stack([head.step_logits(step, s, target.unembed) for step, s in enumerate(states)], 1)
        places = packed.tokens[packed.drafts].tolist()
        truth[request.key] = {place: (logits[i], int(packed.left[i])) for i, place in enumerate(places)}
    compared = 0
    for lengths, keys, logits in seen:
        for row, (length, key) in enumerate(zip(lengths, keys)):
            if length - 1 not in truth.get(key, {}):
                continue  # an idle row, or nothing follows the root
            expected, left = truth[key][length - 1]
            left = min(left, logits.shape[1])  # a draft is no deeper than what may still be said
            compared += left
            assert torch.allclose(logits[row, :left], expected[:left], atol=1e-9, rtol=0), (key, length)
    assert compared > 60


@every_kind
def test_the_loss_is_the_written_out_one_for_any_chunk(kind: str):
    """Every head j, every position from which its token is of the same reply, one at a time (fp64)."""
    target = llava()
    head = make_head(kind, target)
    weights = {"regression": 0.3, "total_variation": 0.5, "ranking": 0.2, "top_k": 0.4, "acceptance": 0.6}
    features = taught(target, head, [dialogue(target, 2), dialogue(target, 1)])
    expected: Any = 0.0
    for b, t, step in itertools.product(range(2), range(features.input_ids.shape[1] - 2), range(4)):
        reply = features.answer[b, t + 1 : t + 3 + step]
        if len(reply) < 2 + step or reply[0] == 0 or (reply != reply[0]).any():
            continue
        truth = features.last_hidden[b, t + 1 + step]
        state = head.blocks[step](features.last_hidden[b, t])
        p, q = target.unembed(truth).softmax(-1), head.step_logits(step, state, target.unembed).softmax(-1)
        u = q.log()[p.topk(10).indices]
        order = sum(u[r:].logsumexp(0) - u[r] for r in range(10))
        best = p.topk(10).indices
        each = -(p * q.log()).sum() + 0.5 * (q - p).abs().sum() + 0.2 * order
        each = each - 0.4 * (p[best] * q[best].log()).sum() - 0.6 * torch.minimum(p, q).sum().log()
        each = each + 0.3 * nn.functional.smooth_l1_loss(state, truth)
        expected = expected + 0.7**step * each
    names = [name for name, _ in head.named_parameters()]
    wanted = torch.autograd.grad(expected, list(head.parameters()))
    for chunk in (1, 7, 1000):
        head.loss = LossConfig(**weights, steps=4, step_decay=0.7, chunk=chunk)
        objective = head(features, target.unembed)
        assert objective.loss.item() == pytest.approx(expected.item(), rel=1e-12)
        found = torch.autograd.grad(objective.loss, list(head.parameters()))
        for name, ours, theirs in zip(names, found, wanted):
            assert torch.allclose(ours, theirs, atol=1e-10, rtol=1e-9), name


def test_it_begins_as_the_target_itself():
    """The identity under the target's unembedding, shared or copied: every head repeats what is said already."""
    target = llava()
    state = torch.randn(3, target.shape.hidden_size, dtype=torch.float64)
    for own in (False, True):
        head = Head(Config(own_head=own, n_blocks=2).resolve(target.shape)).double()
        head.prepare(target, None)
        logits = head.logits(head.ahead(state), target.unembed)
        assert torch.equal(head.ahead(state), state.unsqueeze(1).expand(-1, 4, -1))
        assert torch.allclose(logits, target.unembed(state).unsqueeze(1).expand_as(logits), atol=1e-12)


@every_kind
def test_joined_blocks_are_the_single_ones(kind: str):
    target = llava()
    head = make_head(kind, target).eval().requires_grad_(False)
    state = torch.randn(2, target.shape.hidden_size, dtype=torch.float64)
    apart = head.ahead(state)
    head.fuse()
    assert torch.allclose(head.ahead(state), apart, atol=1e-12)
    for parameter in head.parameters():
        parameter.mul_(0.5)
    assert torch.allclose(head.ahead(state), torch.stack([b(state) for b in head.blocks], 1), atol=1e-12)


def test_it_overfits_one_batch_and_then_drafts_its_answers():
    target = llava()
    wanted = [Request(f"r{i}", prompt(target, i, 5, 1), 20, i) for i in range(3)]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    rows = []
    for request, output in zip(wanted, plain):
        ids = torch.cat([request.prompt.input_ids, torch.tensor(output.tokens)])
        extra = torch.zeros(len(output.tokens), dtype=torch.bool)
        answer = torch.cat([torch.zeros(len(request.prompt), dtype=torch.long), extra.long() + 1])
        rows.append((Prompt(ids, torch.cat([request.prompt.visual, extra]), request.prompt.pixels), answer))
    torch.manual_seed(0)
    head = Head(Config(own_head=True, n_blocks=3).resolve(target.shape), LossConfig(steps=4)).double()
    head.prepare(target, None)
    features = taught(target, head, rows)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(400):
        objective = head(features, target.unembed)
        optimizer.zero_grad()
        (objective.loss / objective.count).backward()
        optimizer.step()
    assert float(objective.sums["top1"] / objective.counts["top1"]) > 0.95
    drafted = generate(target, wanted, head.drafter(target, 1), FixedPolicy(4, 4), GreedySampler(), max_batch=3)
    rounds = [r for o in drafted for r in o.rounds[:-1]]
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    assert sum(r[2] for r in rounds) / len(rounds) > 3.0  # of 4 offered


# ---- trees ----


def by_heap(tokens: Any, scores: Any, n: int) -> dict[tuple[int, ...], float]:
    """The n best paths of tokens, and their scores: what is added next hangs from, or stands beside, what was taken."""
    K, k = scores.shape

    def worth(path: tuple[int, ...]) -> float:
        return float(sum(scores[level, rank] for level, rank in enumerate(path)))

    queue, best = [(-worth((0,)), (0,))], {}
    while queue and len(best) < n:
        cost, path = heapq.heappop(queue)
        best[tuple(int(tokens[level, rank]) for level, rank in enumerate(path))] = -cost
        if path[-1] + 1 < k:
            heapq.heappush(queue, (-worth(sideways := (*path[:-1], path[-1] + 1)), sideways))
        if len(path) < K:
            heapq.heappush(queue, (-worth(deeper := (*path, 0)), deeper))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("depth", "width"), [(1, 40), (3, 7), (4, 40), (5, 3), (4, 1)])
def test_the_tree_is_that_of_a_heap_over_all_paths(depth: int, width: int, seed: int):
    """Tokens and scores of every node, for rows of different budgets and distributions from sure to flat."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.tensor([0.1, 1.0, 6.0]).view(3, 1, 1)
    q = (spread * torch.randn(3, depth, 50, generator=generator)).double().log_softmax(-1).topk(width, -1)
    budget, roots = (40, 17, 1), torch.tensor([7, 8, 9])
    tree = best_products(roots, q.indices, q.values, budget, with_scores=True)
    assert tree.tokens[:, 0].tolist() == roots.tolist()
    for row, n in enumerate(budget):
        found = {}
        for node in range(1, tree.tokens.shape[1]):
            if tree.parents[row, node] < 0:
                continue
            path = tree.ancestors[row, node].nonzero().flatten().tolist()
            assert int(tree.depths[row, node]) == len(path) - 1
            found[tuple(tree.tokens[row, path[1:]].tolist())] = float(tree.scores[row, node])
        expected = by_heap(q.indices[row], q.values[row], n)
        assert found == {path: pytest.approx(score, abs=1e-9) for path, score in expected.items()}


def test_equal_scores_give_a_tree_as_well():
    """Candidates of log-probability 0, and levels where all are alike: a parent stays before its children."""
    zeros = torch.zeros(1, 4, 10)
    for scores in (zeros, zeros - 2.0, torch.full_like(zeros, float("nan"))):
        tree = best_products(torch.tensor([1]), torch.arange(40).view(1, 4, 10), scores, (25,))
        assert tree.tokens.shape == (1, 26)
        assert (tree.parents[0, 1:] < torch.arange(1, 26)).all()
        assert (tree.parents[0, 1:] >= 0).all()


@every_kind
def test_a_static_tree_holds_the_candidates_of_its_ranks(kind: str):
    target = llava()
    head = make_head(kind, target).eval().requires_grad_(False)
    requests = [prompt(target, 4), prompt(target, 7)]
    with torch.inference_mode():
        state = target.open(2, 64)
        drafter = head.drafter(target, 2, shape=MEDUSA_63)
        drafter.open(2, 64)
        forwards = [target.prefill(state, row, request) for row, request in enumerate(requests)]
        roots = torch.stack([forward.logits[0, -1].argmax() for forward in forwards])
        for row, (request, forward) in enumerate(zip(requests, forwards)):
            drafter.admit(row, Request(str(row), request, 1), forward, roots[row])
        for depth, budget in ((4, (63, 20)), (2, (63, 9)), (9, (200, 64))):
            tree = drafter.propose(roots, Plan(depth, budget))
            shape = MEDUSA_63.cut(max(budget), depth)
            for row, forward in enumerate(forwards):
                ranked = head.logits(head.ahead(forward.last_hidden[0, -1]), target.unembed).argsort(
                    -1, descending=True
                )
                for node in range(1, tree.tokens.shape[1]):
                    if tree.parents[row, node] >= 0:
                        level = int(shape.depths[node]) - 1
                        assert int(tree.tokens[row, node]) == int(ranked[level, shape.ranks[node]])
                assert int((tree.parents[row] >= 0).sum()) == min(budget[row], shape.budget)


def test_a_width_below_the_budget_bounds_the_candidates_of_a_level():
    target = llava()
    drafter = make_head("medusa", target).drafter(target, 2)
    drafter.open(1, 64)
    tree = drafter.propose(torch.tensor([3]), Plan(4, (30,)))
    assert tree.tokens.shape == (1, 31)  # 2 + 4 + 8 + 16 nodes
    assert max(len(set(tree.tokens[0, tree.depths[0] == level].tolist())) for level in range(1, 5)) == 2


def test_a_draft_runs_no_target_pass_and_asks_the_host_for_nothing():
    """Every tensor of a round stays where it is: no item, no list, no boolean of a tensor."""
    target = llava()
    drafter = make_head("medusa", target).drafter(target, 9)
    drafter.open(4, 64)
    drafter.propose(torch.tensor([1, 2, 3, 4]), Plan(4, (9, 3, 0, 5)))  # tables are made once

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(function, "__name__", "")
            assert name not in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "cpu"), name
            return function(*args, **(kwargs or {}))

    with Watched():
        tree = drafter.propose(torch.tensor([1, 2, 3, 4]), Plan(4, (9, 3, 0, 5)))
    assert tree.tokens.shape == (4, 10)


@every_kind
def test_sampling_shares_the_noise_and_rejection_draws(kind: str):
    """With the noise in view the text is plain decoding's; drawn trees say what they were drawn from."""
    target = llava()
    head = make_head(kind, target)
    wanted = families.requests(target, 5, 10)
    sampler = KeyedSampler(0.9, seed=4)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), sampler)
    shared = generate(target, wanted, head.drafter(target, 3, sampler), FixedPolicy(4, 9), sampler, max_batch=2)
    assert [o.tokens for o in shared] == [o.tokens for o in plain]
    drawing = head.drafter(target, 3, sampler, widths=(3, 2))
    outputs = generate(target, wanted, drawing, FixedPolicy(4, 15), sampler, 2, verifier=RejectionVerifier(sampler))
    assert all(output.error is None and output.tokens for output in outputs)
    drawing.open(2, 64)
    tree = drawing.propose(torch.tensor([1, 2]), Plan(4, (20, 4)))
    assert tree.proposals is not None
    assert tree.proposals.widths == (3, 2, 1, 1)
    assert tree.depths[0].bincount().tolist() == [1, 3, 6, 6, 5]
    assert int((tree.parents[1] >= 0).sum()) == 4
    for node in range(tree.tokens.shape[1]):
        children = tree.tokens[0, tree.parents[0] == node].tolist()
        assert len(children) == len(set(children))
    with pytest.raises(ValueError, match="may not decide"):
        drawing.propose(torch.tensor([1, 2]), Plan(4, (9, 9), prune=lambda trees: trees))


@every_kind
def test_a_tree_is_fitted_to_it_by_its_own_ranks(kind: str):
    """Level by level: how often the token that the target went on with is the head's best."""
    target = llava()
    head = make_head(kind, target)
    request = Request("r", prompt(target, 3), 30)
    tokens = generate(target, [request], NullDrafter(), SkipPolicy(), GreedySampler())[0].tokens
    counts = fit_tree.Counts(6)
    fit_tree.count_head(head, target, request, tokens, counts)
    n = len(tokens)
    assert counts.trials.tolist() == [n - 1, n - 2, n - 3, n - 4, 0, 0]
    ids = torch.cat([request.prompt.input_ids, torch.tensor(tokens)])
    visual = nn.functional.pad(request.prompt.visual, (0, n))
    states = target.prefill(target.open(1, 64), 0, Prompt(ids, visual, request.prompt.pixels)).last_hidden[0]
    begins = states[len(request.prompt) - 1 :]
    for step in range(4):
        best = head.logits(head.ahead(begins[: n - 1 - step]), target.unembed)[:, step].argmax(-1)
        assert int(counts.hits[step, 0]) == int((best == torch.tensor(tokens[step + 1 :])).sum())


# ---- settings, files, counts ----


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"n_ahead": 0}, "n_ahead must be at least 1"),
        ({"n_blocks": 0}, "n_blocks must be at least 1"),
        ({"image_input": "embeds"}, "'none'"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Config(**values)


def test_each_head_is_a_step_of_the_loss():
    config = Config(n_ahead=3).resolve(llava().shape)
    with pytest.raises(InputError, match=r"loss.steps=4 must be head.n_ahead=3"):
        Head(config, LossConfig(steps=4))
    assert Head(config).loss.steps == 3
    with pytest.raises(InputError, match="no decoder block"):
        Head(config).take_layer(llava(), 0)


@every_kind
def test_what_was_saved_comes_back_and_another_target_is_refused(kind: str, tmp_path: Path):
    target = llava()
    head = make_head(kind, target)
    checkpoint.save_head(tmp_path, head.state_dict(), head.config, target)
    checkpoint.save_tree(tmp_path, checkpoint.DraftTree(4, 3, 9))
    loaded = checkpoint.load(tmp_path)
    loaded.check_target(target)
    assert (loaded.kind, loaded.config) == ("medusa", head.config)
    again = loaded.head(torch.float64)
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(InputError, match="fingerprint"):
        loaded.check_target(llava(seed=5))
    wanted = families.requests(target, 4, 10)
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    for policy in ("fixed", *NAMED):
        drafter, decides = drafter_and_policy(loaded, target, policy)
        outputs = generate(target, wanted, drafter, decides, GreedySampler(), max_batch=2)
        assert [o.tokens for o in outputs] == [o.tokens for o in plain], policy
        nodes = max(nodes for o in outputs for _, nodes, _, _ in o.rounds)
        assert nodes == (9 if policy == "fixed" else NAMED[policy].cut(99, 4).budget)
    with pytest.raises(InputError, match=r"static_tree\.json cannot be read"):
        drafter_and_policy(loaded, target, "static")


@every_kind
def test_operations_are_those_of_the_products_that_run(kind: str):
    """Every linear layer of head and target where it is called; own unembeddings by the predictions they are given."""
    target = llava()
    head = make_head(kind, target, steps=3)
    ran = [0]

    def note(module: Any, args: Any, _: Any) -> None:
        ran[0] += 2 * args[0].numel() * module.out_features

    layers = [m for m in [*head.modules(), target.lm_head] if isinstance(m, nn.Linear)]
    handles = [layer.register_forward_hook(note) for layer in layers]
    features = taught(target, head, [dialogue(target, 1 + b) for b in range(2)])
    with torch.no_grad():
        head(features, target.unembed)
    for handle in handles:
        handle.remove()
    work = counted(features.valid, features.answer, features.segment, 3)
    assert is_counted(head)
    assert ran[0] == pytest.approx(float(head_cost(head, target.shape, 3, backward=False).of(work)), rel=0.03)
    # Of a block that reads the target's states there is one gradient more, its weight's; of all else there are two.
    forward, whole = (head_cost(head, target.shape, 3, backward) for backward in (False, True))
    square = 2 * target.shape.hidden_size**2
    deeper = 2 * 3 * square if kind == "medusa_own" else 0
    assert whole.drafts - forward.drafts == 3 * square + deeper
    assert whole.predictions == pytest.approx((3 if kind == "medusa_own" else 2) * forward.predictions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_kind
def test_what_is_counted_is_what_autograd_keeps(kind: str, dtype: torch.dtype):
    """Every tensor that the forward pass saves, storages counted once."""
    shape = dataclasses.replace(llava().shape, hidden_size=256, vocab_size=300)
    own = kind == "medusa_own"
    config, loss = Config(own_head=own, n_blocks=1 + own).resolve(shape), LossConfig(steps=4)
    head = Head(config, loss).to(dtype)
    facts = memory.head_facts("medusa", head, TargetFacts(shape, 0, 0, 0, 0, 0, 0, "here"))
    assert facts.exact
    assert facts.n == sum(p.numel() for p in head.parameters())
    lengths, answers = (120, 90), (70, 30)
    marks = torch.zeros(2, 120, dtype=torch.long)
    valid = torch.zeros(2, 120, dtype=torch.bool)
    for row, (length, n) in enumerate(zip(lengths, answers)):
        valid[row, :length], marks[row, length - n : length] = True, 1
    states, unembedding = torch.randn(2, 120, 256, dtype=dtype), torch.randn(300, 256, dtype=dtype)
    features = Features(marks, valid, marks, marks > 1, states, states)
    given = {tensor.untyped_storage().data_ptr() for tensor in (*head.parameters(), unembedding, states)}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(features, lambda x: x @ unembedding.T)
    kept = sum(storage.nbytes() for storage in saved.values())
    batch, half = Batch(lengths, answers), dtype.itemsize
    mine = memory.activations(facts, batch, loss, half)
    # Of what is counted autograd keeps neither last states, truth and predictions nor their gradients.
    mine -= (1 + loss.steps) * sum(batch.drafts) * 256 * half + batch.predictions(4) * 256 * half * (3 if own else 2)
    assert mine == pytest.approx(kept, rel=0.03)
