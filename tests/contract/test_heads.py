"""Every head: training and drafting are one computation, and the shift contract holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from mmspec.drafters.null import NullDrafter
from mmspec.loop import generate
from mmspec.losses import LossConfig, valid_pairs
from mmspec.nn import attend
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler
from mmspec.static_tree import StaticTree
from mmspec.types import Plan, Prompt, Request
from tests.dense import dense_unroll
from tests.drafters import ALL_HEADS, HEADS, make_head
from tests.tiny import image, llava, prompt

every_head = pytest.mark.parametrize("kind", HEADS)
any_head = pytest.mark.parametrize("kind", ALL_HEADS)
"""Of whatever family: what is asked of them knows of no block."""


def taught(target, trained, rows):
    """Teacher-forced features of (prompt, answer marks)."""
    return target.teacher([p for p, _ in rows], [a for _, a in rows], trained.taps)


def dialogue(target, n_turns=2, images=1):
    """A conversation with `images` in the first turn, and its answer marks."""
    messages = []
    for turn in range(n_turns):
        pictures = [{"type": "image"}] * (images if turn == 0 else 0)
        text = " ".join(f"w{(7 * turn + i) % 50}" for i in range(4))
        messages.append({"role": "user", "content": [*pictures, {"type": "text", "text": text}]})
        reply = " ".join(f"w{(3 * turn + 2 * i) % 50}" for i in range(6))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return target.encode_dialogue(messages, [image(i) for i in range(images)])


@every_head
def test_tree_drafting_equals_chain_drafting_along_each_path(kind):
    """A node's score in the dynamic tree is the score a chain forced through its ancestors gets."""
    target = llava()
    trained = make_head(kind, target, seed=2).eval().requires_grad_(False)
    request = prompt(target, 4)
    with torch.inference_mode():
        state = target.open(1, 64)
        forward = target.prefill(state, 0, request, trained.taps)
        root = forward.logits[0, -1].argmax()
        wide = trained.drafter(target, 3)
        wide.open(1, 64)
        wide.admit(0, Request("r", request, 1), forward, root)
        wide._take_in(keep_last=False)
        tokens, parents, scores, _ = wide._expand(root.reshape(1), wide._root_state(), Plan(3, (9,)))
        for node in range(1, tokens.shape[1]):
            path, walk = [], node
            while walk > 0:
                path.insert(0, walk)
                walk = int(parents[0, walk])
            narrow = trained.drafter(target, 1)
            narrow.open(1, 64)
            narrow.admit(0, Request("r", request, 1), forward, root)
            narrow._take_in(keep_last=False)
            states, total = narrow._root_state(), 0.0
            narrow.kv.begin_tree(3)
            for level, index in enumerate(path):
                log_q = narrow._full(trained.logits(states, target.unembed)).log_softmax(-1)
                total += float(log_q[0, 0, tokens[0, index]])
                mask = torch.zeros(1, 1, 1, narrow.kv.offset + 1, dtype=torch.float64)
                states = narrow._draft_pass(tokens[:, index : index + 1], states, narrow._rope(level, 1), mask)
            assert total == pytest.approx(float(scores[0, node]), abs=1e-9)


@every_head
def test_a_static_tree_holds_the_candidates_of_its_ranks(kind):
    """Each node is what a chain forced through its ancestors would rate at its rank."""
    target = llava()
    trained = make_head(kind, target, seed=2).eval().requires_grad_(False)
    shape = StaticTree.parse("root:3 0:2 2:1 | 01:2 20:1")
    requests = [prompt(target, 4), prompt(target, 7)]
    with torch.inference_mode():
        state = target.open(2, 64)
        filling, chains = trained.drafter(target, 3, shape=shape), trained.drafter(target, 1)
        filling.open(2, 64)
        chains.open(2, 64)
        roots = []
        for row, request in enumerate(requests):
            forward = target.prefill(state, row, request, trained.taps)
            roots.append(forward.logits[0, -1].argmax())
            for drafter in (filling, chains):
                drafter.admit(row, Request(str(row), request, 1), forward, roots[-1])
        tree = filling.propose(torch.stack(roots), Plan(3, (9, 4)))
        chains._take_in(keep_last=False)
        start = chains._root_state()
        for row, node in product(range(2), range(1, 10)):
            path = [*tree.ancestors[row, node].nonzero().flatten().tolist()]
            states = start
            chains.kv.begin_tree(len(path))
            own = torch.zeros(1, 1, 1, 0, dtype=torch.float64)
            for depth, (above, below) in enumerate(pairwise(path)):
                if depth:
                    own = F.pad(own, (0, 1))
                    rope = chains._rope(depth - 1, 1)
                    tokens = tree.tokens[:, above : above + 1]
                    states = chains._draft_pass(tokens, states, rope, chains._masks(own, 2))
                ranked = trained.target_ids(chains._scored(states, depth + 1)[row, 0].argsort(descending=True))
                assert int(ranked[int(shape.ranks[below])]) == int(tree.tokens[row, below])
    assert (tree.parents[0, 1:] >= 0).all()
    assert int((tree.parents[1] >= 0).sum()) == 4


@any_head
def test_the_loss_covers_the_first_reply_pair_and_ends_at_the_stop_token(kind):
    """Shift contract: with reply tokens at 5..8 (stop at 8), step 0 predicts tokens 6, 7, 8 and never 5 or 9."""
    target = llava()
    trained = make_head(kind, target)
    rows = [dialogue(target, n_turns=2)]
    features = taught(target, trained, rows)
    answer = torch.zeros_like(features.answer)
    answer[0, 5:9] = 1
    objective = trained(replace(features, answer=answer), target.unembed)
    assert float(objective.counts["pos_1"]) == 3
    two = answer.clone()
    two[0, 9:12] = 2  # another reply right behind: no pair spans both
    assert float(trained(replace(features, answer=two), target.unembed).counts["pos_1"]) == 3 + 2
    if trained.draft_ids is None:  # else positions without a loss are not counted
        assert int(objective.count) == 3


@any_head
def test_the_first_reply_pair_can_be_left_out(kind):
    """Then its drafts alone have no loss: of a reply of two tokens, which has no other, nothing is left."""
    target = llava()
    head = make_head(kind, target)
    weights = replace(head.loss, first_pair=False)
    features = taught(target, head, [dialogue(target, n_turns=2)])
    short, long = torch.zeros_like(features.answer), torch.zeros_like(features.answer)
    short[0, 5:7], long[0, 5:9] = 1, 1
    with_it = [float(head(replace(features, answer=answer), target.unembed).loss) for answer in (short, long)]
    head.loss = weights
    without = [float(head(replace(features, answer=answer), target.unembed).loss) for answer in (short, long)]
    assert with_it[0] > 0
    assert without[0] == 0
    assert 0 < without[1] < with_it[1]


@any_head
def test_padding_changes_nothing(kind):
    target = llava()
    trained = make_head(kind, target)
    short, long = dialogue(target, 1), dialogue(target, 2)
    alone, both, other = (
        trained(taught(target, trained, rows), target.unembed) for rows in ([short], [short, long], [long])
    )
    assert both.loss.item() == pytest.approx((alone.loss + other.loss).item(), rel=1e-6)
    assert int(both.count) == int(alone.count + other.count)


@pytest.mark.parametrize("width", [1, 60, 1000])
@any_head
def test_packing_changes_nothing(kind, width):
    """Loss, its gradient and every count: rows shared by the target's pass and the head (fp64, 1e-9)."""
    target = llava()
    trained = make_head(kind, target)
    rows = [dialogue(target, 1 + b % 3, images=b % 2) for b in range(5)]
    prompts, answers = [p for p, _ in rows], [a for _, a in rows]
    found = []
    for pack in (0, width):
        features = target.teacher(prompts, answers, trained.taps, pack=pack)
        trained.zero_grad()
        objective = trained(features, target.unembed)
        objective.loss.backward()
        found.append((objective, [p.grad.clone() for p in trained.parameters()], len(features.input_ids)))
    (plain, expected, _), (packed, got, n_rows) = found
    assert n_rows in {1: (5,), 60: (2, 3, 4), 1000: (1,)}[width]
    assert packed.loss.item() == pytest.approx(plain.loss.item(), rel=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9, rtol=1e-9) for a, b in zip(got, expected))
    for name in plain.sums:
        assert packed.sums[name].item() == pytest.approx(plain.sums[name].item(), rel=1e-9), name
        assert packed.counts[name].item() == plain.counts[name].item(), name


@any_head
def test_conversations_that_share_a_row_do_not_meet_even_where_answers_touch(kind):
    """The end of one conversation and the beginning of the next bear the same reply number."""
    target = llava()
    trained = make_head(kind, target)
    features = taught(target, trained, [dialogue(target, 2, images=0)])
    T = features.input_ids.shape[1]
    answer = torch.ones_like(features.answer)
    segment = torch.ones_like(answer)
    segment[:, T // 2 :] = 2
    shared = trained(replace(features, answer=answer, segment=segment), target.unembed)
    assert int(shared.counts["pos_1"]) == T - 4
    assert int(trained(replace(features, answer=answer), target.unembed).counts["pos_1"]) == T - 2


def plain_objective(trained, features, target):
    """The loss written out: all positions attend densely, one prediction at a time, gradients by autograd alone."""
    config, total = trained.loss, 0.0
    for step, states in enumerate(dense_unroll(trained, features, config.steps)):
        for b, t in ((b, t) for b in range(len(states)) for t in range(states.shape[1])):
            reply = features.answer[b, t + 1 : t + 3 + step]
            if len(reply) < 2 + step or reply[0] == 0 or (reply != reply[0]).any():
                continue
            truth = features.last_hidden[b, t + 1 + step]
            z, zq = target.unembed(truth), trained.logits(states[b, t], target.unembed)
            ids = torch.arange(len(z)) if trained.draft_ids is None else trained.draft_ids
            if z.argmax() not in ids:
                continue
            p, log_q = z[ids].softmax(-1), zq.log_softmax(-1)
            loss = -(p * log_q).sum() + config.total_variation * (log_q.exp() - p).abs().sum()
            total = total + config.step_decay**step * loss
            if config.regression:
                close = torch.nn.functional.smooth_l1_loss(states[b, t], truth)
                total = total + config.step_decay**step * config.regression * close
    return total


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@every_head
def test_chunked_loss_has_the_value_and_gradient_of_the_written_out_one(kind, chunk):
    target = llava()
    trained = make_head(kind, target)
    regression = 0.0 if kind.startswith("eagle3") else 0.1
    trained.loss = LossConfig(chunk=chunk, total_variation=0.5, regression=regression, steps=3, step_decay=0.7)
    features = taught(target, trained, [dialogue(target, 2), dialogue(target, 1)])
    found = []
    for loss in (trained(features, target.unembed).loss, plain_objective(trained, features, target)):
        trained.zero_grad()
        (loss * 3.0).backward()
        found.append((loss.item(), {name: p.grad.clone() for name, p in trained.named_parameters()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], atol=1e-10, rtol=1e-9), name
    with torch.no_grad():
        assert trained(features, target.unembed).loss.item() == pytest.approx(found[0][0], rel=1e-12)


@every_head
def test_recomputing_changes_no_gradient_and_keeps_less(kind):
    target = llava()
    trained = make_head(kind, target)
    features = taught(target, trained, [dialogue(target, 2), dialogue(target, 1)])
    found = []
    for recompute in (False, True):
        trained.loss = LossConfig(steps=3, recompute=recompute)
        trained.zero_grad()
        kept = {}

        def note(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = trained(features, target.unembed).loss
        n_bytes = sum(kept.values())
        loss.backward()
        found.append((loss.item(), n_bytes, {name: p.grad.clone() for name, p in trained.named_parameters()}))
    assert found[0][0] == found[1][0]
    assert found[1][1] < 0.8 * found[0][1]
    assert all(torch.equal(gradient, found[1][2][name]) for name, gradient in found[0][2].items())


@any_head
def test_a_batch_without_answers_has_a_loss_of_zero_that_reaches_every_weight(kind):
    """Ranks must not skip alone: one without a position to train on takes part in the backward pass."""
    target = llava()
    trained = make_head(kind, target)
    features = taught(target, trained, [dialogue(target, 1)])
    objective = trained(replace(features, answer=torch.zeros_like(features.answer)), target.unembed)
    objective.loss.backward()
    assert objective.loss.item() == objective.count.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trained.parameters())


@any_head
def test_the_answer_marks_alone_tell_how_many_positions_there_are(kind):
    """What a step divides by is agreed on before any forward pass."""
    target = llava()
    rows = [dialogue(target, 1), dialogue(target, 2)]
    trained = make_head(kind, target)
    objective = trained(taught(target, trained, rows), target.unembed)
    assert int(objective.count) == sum(valid_pairs(answer) for _, answer in rows) > 0


@pytest.mark.parametrize("kind", [k if k == "eagle3" else pytest.param(k, marks=pytest.mark.slow) for k in HEADS])
def test_a_head_overfits_one_batch_and_then_drafts_its_answers(kind):
    target = llava()  # in fp64: 400 steps make of a rounding in fp32 another head
    wanted = [Request(f"r{i}", prompt(target, i, 5, 1), 20, i) for i in range(3)]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    rows = []
    for request, output in zip(wanted, plain):
        ids = torch.cat([request.prompt.input_ids, torch.tensor(output.tokens)])
        extra = torch.zeros(len(output.tokens), dtype=torch.bool)
        answer = torch.cat([torch.zeros(len(request.prompt), dtype=torch.long), extra.long() + 1])
        visual = torch.cat([request.prompt.visual, extra])
        rows.append((Prompt(ids, visual, request.prompt.pixels), answer))
    torch.manual_seed(0)
    trained = HEADS[kind](target, LossConfig(steps=4)).double()
    if trained.draft_ids is not None:  # one that has every token of the answers
        counts = torch.cat([p.input_ids[a > 0] for p, a in rows]).bincount(minlength=target.shape.vocab_size)
        trained.prepare(target, lambda: counts)
    features = taught(target, trained, rows)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        objective = trained(features, target.unembed)
        optimizer.zero_grad()
        (objective.loss / objective.count).backward()
        optimizer.step()
    assert float(objective.sums["top1"] / objective.counts["top1"]) > 0.95
    # A chain: a random target is unsure of itself, and a tree of its best nodes would be broad and shallow.
    drafted = generate(target, wanted, trained.drafter(target, 1), FixedPolicy(4, 4), GreedySampler(), max_batch=3)
    rounds = [r for o in drafted for r in o.rounds[:-1]]
    assert [o.tokens for o in drafted] == [o.tokens for o in plain]
    assert sum(r[2] for r in rounds) / len(rounds) > 3.0  # of 4 offered


@every_head
def test_a_skipped_round_runs_no_head(kind):
    target = llava()
    drafter = make_head(kind, target).drafter(target, 2)
    calls = []
    drafter.head.block.register_forward_pre_hook(lambda *_: calls.append(1))
    generate(target, [Request("r", prompt(target, 1), 15)], drafter, SkipPolicy(), GreedySampler())
    assert not calls
    assert drafter.propose(torch.tensor([3]), Plan(0, (0,))).tokens.shape == (1, 1)
    assert not calls


@any_head
def test_a_head_in_training_is_copied_not_frozen(kind):
    target = llava()
    trained = make_head(kind, target)
    trained.drafter(target, 2)
    assert trained.training
    assert all(p.requires_grad for p in trained.parameters())


# ---- how the steps are simulated ----


def harmonised(trained, features, passes):
    """HASS in its own counting (arXiv 2408.15766): pass j has at pair i the output of pass j - 1 at pair i - 1; its
    keys are of true features up to pair i - j and of the passes 1..j at the pairs from i - j + 1 to i. For one row."""
    T = features.input_ids.shape[1]
    n, embeds = T - 2, features.embeds[:, 1:-1]
    rope = trained.rotary.at(torch.arange(n)[None], T, embeds.dtype)
    states, keys, outputs = trained.enter(trained.read(features)[:, :n]), [], []
    for j in range(passes):

        def attention(q, k, v, j=j):
            groups = q.shape[1] // k.shape[1]
            keys.append((k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
            out = []
            for i in range(n):
                # Of pair p it sees what pass max(p - (i - j), 0) made of it.
                made = [keys[min(max(p - (i - j), 0), p)] for p in range(i + 1)]
                k_i = torch.stack([pair[0][:, :, p] for p, pair in enumerate(made)], 2)
                v_i = torch.stack([pair[1][:, :, p] for p, pair in enumerate(made)], 2)
                out.append(attend(q[:, :, i : i + 1], k_i, v_i))
            return torch.cat(out, 2)

        states = trained.block(trained.pair(embeds, states), rope, attention)
        outputs.append(states)
        states = torch.cat([trained.enter(trained.read(features)[:, :1]), states[:, :-1]], 1).detach()
    return outputs


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_harmonised_alignment_is_this_unroll_with_steps_taken_as_given(kind):
    """Outputs and gradients, in the method's own counting with all scores."""
    target = llava()
    trained = make_head(kind, target)
    features = taught(target, trained, [dialogue(target, 1, images=0)])
    trained.loss = LossConfig(steps=3, unroll="hass")
    passes = harmonised(trained, features, 3)
    packed, outputs = trained.unroll(features, 3)
    total = torch.zeros((), dtype=torch.float64)
    theirs = torch.zeros((), dtype=torch.float64)
    for step, states in enumerate(outputs):
        for t, state, left in zip(packed.tokens[packed.drafts].tolist(), states, packed.left.tolist()):
            if left > step:
                assert torch.allclose(state, passes[step][0, t + step], atol=1e-9, rtol=0), (step, t)
                total, theirs = total + state.square().sum(), theirs + passes[step][0, t + step].square().sum()
    found = []
    for loss in (total, theirs):
        trained.zero_grad()
        loss.backward(retain_graph=True)
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained.parameters()])
    assert all(torch.allclose(a, b, atol=1e-8, rtol=1e-8) for a, b in zip(*found))


@every_head
def test_steps_taken_as_given_change_gradients_alone(kind):
    target = llava()
    trained = make_head(kind, target)
    features = taught(target, trained, [dialogue(target, 2)])
    found = []
    for unroll in ("ttt", "hass"):
        trained.loss = LossConfig(steps=3, unroll=unroll)
        trained.zero_grad()
        loss = trained(features, target.unembed).loss
        loss.backward()
        found.append((loss.item(), trained.block.q_proj.weight.grad.clone()))
    assert found[0][0] == found[1][0]
    assert not torch.allclose(found[0][1], found[1][1])


def test_a_single_step_is_said_as_such():
    assert LossConfig(unroll="none", steps=1).steps == 1
    with pytest.raises(ValueError, match=r"set loss\.steps=1"):
        LossConfig(unroll="none")
    with pytest.raises(ValueError, match=r"loss\.unroll='tt' must be one of: ttt, hass, none"):
        LossConfig(unroll="tt")
