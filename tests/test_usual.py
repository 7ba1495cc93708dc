"""A controller is asked where that pays, and else the best single depth is drafted; what is kept of its training."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mmspec import checkpoint
from mmspec.heads import viskip
from mmspec.policies import Parts, make_policy
from mmspec.policies._usual import UsualDepth, advantage, expected_seconds
from mmspec.types import StepTrace, Trials
from tests.test_policy import Flat, Told, rounds, sensed
from train.calibrate import Best, calibrate, reliability, remember

COST = [1.0, 1.2, 1.4, 1.6, 1.8]


def trials(foreseen, n=400, seed=0):
    """Half the rounds accept nothing, half all four tokens; `foreseen`: it knows which, or claims the contrary."""
    good = np.random.default_rng(seed).random(n) < 0.5
    sure = np.where(good if foreseen else ~good, 0.97, 0.03)
    return Trials(np.repeat(sure[:, None], 4, 1), np.where(good, 4, 0), np.full(n, 4), np.arange(n))


def test_the_advantage_is_what_foresight_is_worth_by_hand():
    """One depth for all: (1 + 4 / 2) / 1.8 a second. Knowing: 1 / 1.0 and 5 / 1.8, half each."""
    known = trials(True, 20000)
    gain, error = advantage(known, COST, 1)
    share = (known.accepted > 0).mean()
    usual = (1 + 4 * share) / 1.8
    spared = (1 - share) * (1.8 - 1.0) * usual  # in tokens, of rounds that are known to accept nothing
    assert gain == pytest.approx(spared / (1 + 4 * share), rel=1e-6)
    assert 0 < error < 0.01
    wrong, _ = advantage(trials(False), COST, 1)
    assert wrong < -0.1
    shared, _ = advantage(known, COST, 8)
    assert 0 <= shared < gain / 2, "eight rows that share a depth have little to foresee"


def test_rounds_of_one_image_are_one_observation_of_the_advantage():
    """Every round five times over: nothing more is known than was before."""
    once, n = trials(True, 600), 600
    five = Trials(*(np.repeat(table, 5, 0) for table in (once.chances, once.accepted, once.reach, once.image)))
    apart = replace(five, image=np.arange(5 * n))
    gain, error = advantage(once, COST, 1)
    assert advantage(five, COST, 1) == pytest.approx((gain, error), rel=1e-6)
    assert advantage(apart, COST, 1) == pytest.approx((gain, error / 5**0.5), rel=1e-2)
    alone = Trials(once.chances, once.accepted, once.reach, np.zeros(n))
    assert advantage(alone, COST, 1) == (gain, math.inf), "one image says nothing of others"


@pytest.mark.parametrize(("rows", "each"), [(1, 1), (4, 1), (16, 1), (1, 5), (4, 5)])
def test_the_error_of_the_advantage_is_how_far_it_is_off(rows, each):
    """Against the spread over fresh trials: of as many images, with one round each or five that fail together."""
    found = []
    for seed in range(60):
        some = trials(True, 300 // each, seed)
        whole = Trials(*(np.repeat(table, each, 0) for table in (some.chances, some.accepted, some.reach, some.image)))
        found.append(advantage(whole, COST, rows))
    gains, errors = np.array(found).T
    assert 0.8 * gains.std() < errors.mean() < 1.6 * gains.std(), "rather too large than too small"


def test_copies_that_end_early_cost_what_they_have():
    """Half the drafts have two levels at most, and a deeper plan costs no more than these."""
    some = Trials(np.full((2, 4), 0.5), np.array([1, 2]), np.array([2, 4]), np.arange(2))
    assert expected_seconds(some, COST) == pytest.approx([1.0, 1.2, 1.4, 1.5, 1.6])
    assert expected_seconds(None, COST) == pytest.approx(COST)
    quarter = 0.25  # of two rows neither has more than two levels
    deeper = [quarter * 1.4 + (1 - quarter) * more for more in (1.6, 1.8)]
    assert expected_seconds(some, COST, rows=2) == pytest.approx([1.0, 1.2, 1.4, *deeper])
    assert expected_seconds(some, COST, share=0.5) == pytest.approx([1.0, 1.1, 1.2, 1.25, 1.3])
    assert expected_seconds(None, COST, 2, 0.5) == pytest.approx([1 + 0.75 * (more - 1) for more in COST])


def test_the_advantage_is_of_the_rows_that_have_something_to_draft_from():
    """Alone, a round without it costs and brings the same whatever was planned: half of what is spared is left."""
    known = trials(True, 20000, seed=1)
    half = (known.accepted > 0).mean() / 2
    gain, _ = advantage(known, COST, 1, share=0.5)
    usual = (1 + 4 * half) / (1 + 0.5 * (1.8 - 1.0))
    spared = (0.5 - half) * (1.8 - 1.0) * usual
    assert gain == pytest.approx(spared / (1 + 4 * half), rel=0.03)


def test_the_usual_depth_is_the_best_fixed_one_and_follows_what_comes_of_drafts():
    usual = UsualDepth([0.9, 0.8, 0.7, 0.6])
    usual.price(COST)
    assert usual.depth == 4
    for _ in range(2000):
        usual.learn(1, 4)
    assert usual.depth == 1
    for _ in range(4000):
        usual.learn(0, 1)
    assert usual.depth == 0
    assert usual.drafting == 1
    for _ in range(4000):
        usual.learn(4, 4)
    assert usual.depth == 4
    usual.price([1.0, 5.0, 10.0, 15.0, 20.0])
    assert usual.depth == 0, "what was learned stays where seconds are others"
    censored = UsualDepth([0.9, 0.8, 0.7, 0.6])
    censored.price(COST)
    for _ in range(2000):
        censored.learn(1, 1)  # all there was: no word against deeper drafts
    assert censored.depth == 4


@pytest.mark.parametrize("name", ["viskip", "viskip_refined"])
def test_a_controller_that_foresees_nothing_is_not_asked_and_drafts_are_as_usual(name):
    told = Told([0.9, 0.8, 0.7, 0.6], trials(False))
    policy = make_policy(name, Parts(4, 4, Flat(level=0.2), told, 1))
    policy.open(2, torch.device("cpu"))
    assert not policy.senses
    plan = policy.plan([[], []], [100, 1])
    assert (plan.depth, plan.budget) == (4, (4, 0))
    assert policy.plan([[], []], [3, 2]).depth == 2
    policy.open(2, torch.device("cpu"))
    assert not policy.senses, "nor after another call"


def test_one_that_does_is_asked():
    policy = make_policy("viskip", Parts(4, 4, Flat(level=0.2), Told([0.5, 0.5, 0.5, 0.5], trials(True)), 1))
    policy.open(1, torch.device("cpu"))
    assert policy.senses
    assert policy.plan(sensed([0.9, 0.9, 0.9, 0.9]), [100]).depth == 4
    assert policy.plan(sensed([0.02, 0.01, 0.0, 0.0]), [100]).depth == 0


def test_a_drafter_that_never_pays_loses_next_to_nothing_and_is_noticed_when_it_does():
    never = Told(
        [0.02, 0.0, 0.0, 0.0], Trials(np.full((300, 4), 0.02), np.zeros(300, int), np.full(300, 4), np.arange(300))
    )
    policy = make_policy("viskip", Parts(4, 4, Flat(level=0.2), never, 1))
    policy.open(1, torch.device("cpu"))

    def decode(n, accepted):
        spent = drafted = 0
        for _ in range(n):
            plan = policy.plan([[]], [100])
            got = min(accepted, plan.depth)
            spent, drafted = spent + policy.cost(plan.depth), drafted + (plan.depth > 0)
            policy.observe(StepTrace(plan, (True,), (got,), (got + 1,), 1 + plan.depth, (plan.depth,)))
        return spent / n, drafted / n

    spent, drafted = decode(4000, 0)
    assert spent < 1.006 * policy.cost(0)
    assert drafted > 0
    decode(12000, 4)
    assert decode(100, 4)[1] == 1.0


def test_a_copy_that_ends_before_the_others_of_its_batch_has_not_failed():
    """Two rows, one depth: a copy of one token that was accepted says nothing of the levels that it did not have."""
    policy = make_policy("viskip", Parts(4, 4, Flat(level=0.2), Told([0.9, 0.8, 0.7, 0.6], trials(False)), 1))
    policy.open(2, torch.device("cpu"))
    before = list(policy.met.usual.tried)
    plan = policy.plan([[], []], [100, 100])
    policy.observe(StepTrace(plan, (True, True), (1, 4), (2, 5), 5, (1, 4)))
    fade = UsualDepth._FADE
    assert policy.met.usual.tried[0] == pytest.approx((before[0] * fade + 1) * fade + 1)
    assert policy.met.usual.tried[1] == pytest.approx(before[1] * fade + 1)


@pytest.mark.parametrize(("rows", "pays"), [(1, True), (8, False)])
def test_a_batch_pays_for_the_rows_that_have_nothing_to_copy_and_gains_by_the_others(rows, pays):
    """Of twenty texts three have a copy, of one token, right every other time, for a fifth of a round. That pays alone,
    0.075 tokens for 0.03 rounds, and not where any of eight rows makes all of them be computed, for 0.145."""
    known = Trials(np.full((400, 1), 0.5), np.arange(400) % 2, np.ones(400, int), np.arange(400))
    policy = make_policy("viskip", Parts(1, 1, Flat(level=0.2), Told([0.5], known), 1))
    policy.open(rows, torch.device("cpu"))
    assert not policy.asks
    dice, drafted = np.random.default_rng(0), []
    for _ in range(3000):
        plan = policy.plan([[]] * rows, [100] * rows)
        drafted.append(plan.depth > 0)
        nodes = tuple(int(there) for there in (dice.random(rows) < 0.15) & drafted[-1])
        right = tuple(n * int(dice.random() < 0.5) for n in nodes)
        policy.observe(StepTrace(plan, (True,) * rows, right, tuple(1 + a for a in right), 1 + max(nodes), nodes))
    assert drafted[0]
    assert (np.mean(drafted[1000:]) > 0.9) == pays
    assert (np.mean(drafted[1000:]) < 0.1) != pays


def test_a_controller_is_judged_again_where_there_is_less_to_draft_from():
    """What is spared of a draft of a third of a round is as rare as drafts are, and asking is not."""
    good = np.random.default_rng(1).random(2000) < 0.5
    sure = np.where(good, 0.99, 0.01)[:, None]
    known = Trials(sure, good.astype(int), np.ones(2000, int), np.arange(2000))
    policy = make_policy("viskip", Parts(1, 1, Flat(verify=0.02, level=0.007), Told([0.5], known), 1))
    policy.open(1, torch.device("cpu"))
    assert policy.asks
    for _ in range(400):
        plan = policy.plan(sensed([0.99]), [100])
        policy.observe(StepTrace(plan, (True,), (0,), (1,), 1, (0,)))
    assert policy.met.usual.share < 0.05
    assert not policy.asks
    assert not policy.senses


@pytest.mark.parametrize("said", [[0.98, 0.96, 0.94, 0.92], [0.02, 0.01, 0.0, 0.0]])
def test_where_a_controller_foresees_nothing_drafts_of_late_decide(said):
    """Too sure of drafts that fail, or of none where all come through; without the correction of its logits."""
    right = 4 if said[0] < 0.5 else 0
    parts = Parts(4, 4, Flat(level=0.2), Told([0.9, 0.8, 0.7, 0.6], trials(True)), 1)
    policy = make_policy("viskip", parts, {"bias_rate": 0.0})
    policy.open(1, torch.device("cpu"))
    assert policy.asks
    row, depths = sensed(said)[0], []
    for _ in range(3000):
        plan = policy.plan([row], [100])
        got = min(right, plan.depth)
        depths.append(plan.depth)
        policy.observe(StepTrace(plan, (True,), (got,), (got + 1,), 1 + plan.depth, (plan.depth,)))
        row = [1 + got, plan.depth, *row[2:]]
    assert depths[0] == 4 - right
    assert sum(depth == right for depth in depths[-500:]) > 480
    assert policy.met.trust < 0
    # And back: from now on it is right.
    row = sensed([0.98] * 4 if right == 0 else [0.02, 0.0, 0.0, 0.0])[0]
    for _ in range(3000):
        plan = policy.plan([row], [100])
        got = min(4 - right, plan.depth)
        policy.observe(StepTrace(plan, (True,), (got,), (got + 1,), 1 + plan.depth, (plan.depth,)))
        row = [1 + got, plan.depth, *row[2:]]
        depths.append(plan.depth)
    assert sum(depth == 4 - right for depth in depths[-500:]) > 480


def test_text_of_another_kind_is_noticed_within_a_hundred_drafts():
    usual = UsualDepth([0.95, 0.9, 0.85, 0.8])
    usual.price([1.0, 1.2, 1.4, 1.6, 1.8])
    assert usual.depth == 4
    for _ in range(100):
        usual.learn(min(1, usual.depth), usual.depth)
    assert usual.depth == 1
    for _ in range(600):  # levels that are not drafted say nothing, and are tried again
        usual.learn(usual.depth, usual.depth)
    assert usual.depth == 4


def test_policies_that_ask_nobody_say_what_their_plans_follow_from():
    device = torch.device("cpu")

    def unasked(name, prior, known, batch=4):
        parts = Parts(4, 4, Flat(level=0.2), Told(prior, known), 1)
        return make_policy(name, parts).unasked(batch, device, False)

    prior = [0.9, 0.8, 0.7, 0.6]
    one = unasked("viskip", prior, trials(False))
    assert one == unasked("viskip", prior, trials(False, seed=1)), (
        "what a controller that is not asked foresees is nothing"
    )
    assert one != unasked("viskip", [0.9, 0.8, 0.7, 0.5], trials(False))
    assert one != unasked("viskip_refined", prior, trials(False))
    assert unasked("viskip", prior, trials(True)) is None
    assert unasked("viskip", prior, None) is None


class Moody(Told):
    """Foresees greedy rounds, and none that are sampled, of which fewer tokens are accepted."""

    def at(self, sampled):
        drawn = Trials(np.full((400, 4), 0.1), np.arange(400) % 2, np.full(400, 4), np.arange(400))
        return replace(super().at(False), prior=[0.5, 0.0, 0.0, 0.0], trials=drawn) if sampled else super().at(False)


def test_what_is_known_of_greedy_rounds_does_not_decide_where_tokens_are_drawn():
    policy = make_policy("viskip", Parts(4, 4, Flat(level=0.2), Moody([0.9, 0.8, 0.7, 0.6], trials(True)), 1))
    policy.open(1, torch.device("cpu"))
    assert policy.senses
    greedy = policy.met.usual
    policy.open(1, torch.device("cpu"), sampled=True)
    assert not policy.senses
    assert (greedy.depth, policy.met.usual.depth) == (4, 1)
    policy.met.bias[0] = 1.0
    policy.open(2, torch.device("cpu"))
    assert policy.met.usual is greedy, "nor does the batch change what was learned of drafts"
    assert not any(policy.met.bias)


def test_a_controller_is_not_asked_where_rounds_are_as_short_as_its_own_time():
    """A gain of half a round is seconds where rounds take seconds; where they take 0.1 ms, asking takes more."""
    for second, asked in ((1.0, True), (1e-4, False)):
        costs = Flat(verify=second, level=0.2 * second)
        policy = make_policy("viskip", Parts(4, 4, costs, Moody([0.9, 0.8, 0.7, 0.6], trials(True)), 1))
        policy.open(1, torch.device("cpu"))
        assert policy.asks == asked


def test_training_starts_from_the_mean_round_and_tempering_ends_there():
    data = rounds(2000)
    head = viskip.Head(viskip.Config(hidden_size=6, width=16, depth=3))
    head.fit_statistics(data)
    few = {name: table[:5] for name, table in data.items()}
    mean = head.prior.expand(5, -1)
    assert torch.allclose(head.chances(few).cumprod(1), mean, atol=1e-4)
    torch.nn.init.normal_(head.hazard.weight)
    raw = head.look(few["last_hidden"], few["root_embed"], few["scalars"]).hazard.sigmoid()
    assert torch.allclose(head.chances(few), raw, atol=1e-5), "without a calibration logits are what they are"
    head.scale.zero_()
    head.offset.copy_(head.mean_round())
    assert torch.allclose(head.chances(few).cumprod(1), mean, atol=1e-4)


def fitted(data, steps):
    torch.manual_seed(0)
    head = viskip.Head(viskip.Config(hidden_size=6, width=64, depth=3))
    head.fit_statistics(data)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        objective = head(data)
        optimizer.zero_grad()
        (objective.loss / objective.count).backward()
        optimizer.step()
    return head


def nll(head, data):
    with torch.no_grad():
        return float(head(data).sums["survival_nll"]) / len(data["accepted"])


def loss(chances, data):
    """By hand: each level that was offered and reached counts once."""
    k = torch.arange(1, 4)
    accepted = data["accepted"].unsqueeze(1)
    seen = ((k <= data["reach"].unsqueeze(1)) & (k <= accepted + 1)).float()
    each = torch.where(k <= accepted, chances, 1 - chances).detach().log() * seen
    return -float(each.sum()) / len(accepted)


def test_what_was_learned_by_heart_is_tempered_and_remembered():
    """Forty rounds learned by heart foresee others worse than the mean does; tempered, never worse."""
    held_out = rounds(300, seed=1)
    head = fitted(rounds(40), 300)
    mean = viskip.Head(head.config)
    mean.fit_statistics(rounds(40))
    overfit, blank = nll(head, held_out), nll(mean, held_out)
    assert overfit > blank
    scales = calibrate(head, held_out)
    assert max(scales) < 0.8
    assert loss(head.chances(held_out), held_out) <= blank + 1e-3
    remember(head, held_out)
    assert (head.trial_accepted >= 0).sum() == 300
    assert head.trial_accepted[:300].equal(held_out["accepted"].float())
    assert torch.allclose(head.trial_chances[:300], head.chances(held_out), atol=1e-6)
    some = torch.arange(300) % 3 == 0
    remember(head, {**held_out, "explored": some})
    assert head.trial_accepted[:200].equal(held_out["accepted"][~some].float()), (
        "of shallow drafts more might have come"
    )
    assert (head.trial_accepted >= 0).sum() == 200
    nothing = {name: table[:0] for name, table in held_out.items()}
    assert calibrate(head, nothing) == [1.0, 1.0]
    remember(head, nothing)
    assert (head.trial_accepted >= 0).sum() == 200


def mixed(n, seed):
    """Greedy rounds that the state foretells, and sampled ones of which it says nothing and fewer are accepted."""
    data = rounds(n, seed)
    drawn = torch.arange(n) % 2 == 1
    noise = torch.rand(n, 3, generator=torch.Generator().manual_seed(seed + 100)) < 0.3
    data["accepted"] = torch.where(drawn, noise.long().cumprod(1).sum(1), data["accepted"])
    return {**data, "temperature": drawn.float()}


def test_greedy_and_sampled_rounds_are_calibrated_apart():
    """One scale for both would call half of the rounds too sure, and leave the others too timid."""
    head = fitted(mixed(2000, 0), 150)
    choosing, judging = mixed(600, 1), mixed(3000, 2)
    before = {b["temperature"]: b["by_depth"][0] for b in reliability(head, judging)}
    greedy, drawn = calibrate(head, choosing)
    assert greedy > drawn
    after = {b["temperature"]: b["by_depth"][0] for b in reliability(head, judging)}
    assert after[1.0]["ece"] < 0.05 < before[1.0]["ece"]
    assert after[1.0]["brier"] < before[1.0]["brier"]
    assert after[0.0]["ece"] < 0.05 < before[0.0]["ece"]
    assert after[0.0]["brier"] < before[0.0]["brier"]
    remember(head, judging)
    deployed = viskip.Deployed(head.eval(), torch.nn.Embedding(5, 6), 5)
    assert deployed.at(True).prior[0] == pytest.approx(0.3, abs=0.05)
    assert deployed.at(False).prior[0] == pytest.approx(0.5, abs=0.05)
    for sampled in (False, True):
        c, mine = deployed.at(sampled), (judging["temperature"] > 0) == sampled
        assert len(c.trials.accepted) == viskip.N_TRIALS // 2
        states = judging["last_hidden"][mine][:9]
        columns = deployed.look(states, torch.zeros(9, dtype=torch.long))
        deployed.bias[0] = head.from_state.bias.detach() / 2  # these rounds have no root
        raw = deployed.logits(torch.cat(columns, 1).tolist(), judging["scalars"][mine][:9].tolist())
        said = raw * c.scale + c.offset
        few = {name: table[mine][:9] for name, table in judging.items()}
        assert torch.allclose(torch.tensor(said).float().sigmoid(), head.chances(few).detach(), atol=1e-4)


def test_the_best_step_is_kept_and_an_interruption_forgets_only_what_came_later(tmp_path):
    path = tmp_path / "best.safetensors"
    weights = [{"x": torch.tensor([float(i)])} for i in range(4)]
    best = Best(path)
    for step, value in ((1, 3.0), (2, 2.0), (3, 2.5)):
        best.offer(step, value, weights[step])
    assert best.weights()["x"].item() == 2.0
    again = Best(path)
    again.forget(after=2)
    assert (again.step, again.nll) == (2, 2.0)
    again.offer(3, 2.5, weights[3])
    assert again.weights()["x"].item() == 2.0
    earlier = Best(path)
    earlier.forget(after=1)  # a run that goes on before the best step makes it again
    assert earlier.step < 0
    assert not path.is_file()
    unknown = Best(path)
    for step in (1, 2):
        unknown.offer(step, float("inf"), weights[step])
    assert unknown.weights()["x"].item() == 2.0, "nothing held out: the latest"


def test_a_controller_of_before_is_loaded_and_asked(tmp_path):
    head = viskip.Head(viskip.Config(hidden_size=6, width=8, depth=3))
    state = {name: table for name, table in head.state_dict().items() if name not in viskip.Head.LATER}
    checkpoint.write_tensors(tmp_path / "viskip.safetensors", state)
    again = checkpoint._filled(viskip.Head(head.config), tmp_path / "viskip.safetensors", torch.float32)
    assert torch.equal(again.inner.weight, head.inner.weight)
    old = viskip.Deployed(again, torch.nn.Embedding(5, 6), 5).at(True)
    assert old.trials is None
    assert (old.scale.tolist(), old.offset.tolist()) == ([1.0] * 3, [0.0] * 3), "its logits are what they were"
    assert old.prior == pytest.approx(head.prior.tolist(), abs=1e-3)
    ends = torch.tensor([0, 1, 2, 3])
    again.remember(torch.full((4, 3), 0.5), ends, torch.full((4,), 3), torch.zeros(4), torch.tensor([7, 7, 9, 9]))
    trials = viskip.Deployed(again, torch.nn.Embedding(5, 6), 5).at(True).trials  # better others than none
    assert trials is not None
    assert (trials.chances.shape, trials.accepted.tolist(), trials.reach.tolist()) == ((4, 3), [0, 1, 2, 3], [3] * 4)
    assert trials.image.tolist() == [7, 7, 9, 9]
