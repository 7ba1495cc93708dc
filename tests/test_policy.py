"""Policies: decided before drafting, priced by cost, and blind to everything but the committed context."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmspec import costs as tables
from mmspec import metrics
from mmspec.costs import CostTable, hardware, load_or_measure, table_path
from mmspec.drafters.null import NullDrafter
from mmspec.heads import viskip
from mmspec.heads.eagle import Config, Head
from mmspec.loop import generate
from mmspec.policies import Parts, make_policy
from mmspec.policy import (
    SCALARS,
    AdaptivePolicy,
    AttentionPolicy,
    FixedPolicy,
    History,
    RecordingPolicy,
    SkipPolicy,
    scalars,
)
from mmspec.sampling import GreedySampler, KeyedSampler
from mmspec.tree import pruned
from mmspec.types import Calibration, Evidence, Request, StepTrace
from tests.drafters import Scripted, known_answers
from tests.tiny import llava, prompt


class Told:
    """A controller that is told each row's survival, in place of what it would see."""

    def __init__(self, survival, trials=None):
        self.survival, self.trials = survival, trials

    def at(self, sampled):
        return Calibration(self.survival, np.ones(len(self.survival)), np.zeros(len(self.survival)), self.trials)

    def look(self, last_hidden, roots):
        return []

    def logits(self, seen, scalars):
        seen = np.array(seen)
        chances = seen / np.concatenate([np.ones((len(seen), 1)), seen[:, :-1]], 1).clip(1e-9)
        return (np.log(chances.clip(1e-6, 1 - 1e-6)) - np.log(1 - chances.clip(1e-6, 1 - 1e-6))).tolist()


class Flat:
    """Seconds: a verification `verify` plus `node` a node, a draft level `level`."""

    def __init__(self, verify=1.0, node=0.0, level=0.1):
        self.base, self.node, self.level = verify, node, level

    def verify(self, batch, nodes):
        return self.base + self.node * batch * nodes

    def draft(self, batch, depth):
        return self.level * depth


def policy(survival, costs, depth=4, budget=8, rows=1):
    learned = make_policy("viskip", Parts(depth, budget, costs, Told(survival)), {"bias_rate": 0.0})
    learned.open(rows, torch.device("cpu"))
    return learned


def sensed(survival, rows=1):
    """As `sense` says it: nothing drafted in the round before, 20 tokens committed, an undecided root."""
    return [[1, 0, 20, 12, 4, 1.0, 0.5, 0.3, 0.5, *survival]] * rows


def settled(learned, survival, rounds=200):
    """The plan once the price is that of what such plans achieve; what is tried against all likelihood aside."""
    usual = None
    for _ in range(rounds):
        plan = learned.plan(sensed(survival), [100])
        gain = sum(survival[: plan.depth])
        learned.observe(StepTrace(plan, (True,), (gain,), (gain + 1,), 1 + max(plan.budget)))
        usual = usual if learned.tries else plan
    return usual


@pytest.mark.parametrize(
    ("survival", "costs", "depth"),
    [
        ([0.9, 0.8, 0.7, 0.6], Flat(), 4),  # every level pays
        ([0.02, 0.01, 0.0, 0.0], Flat(), 0),  # a hopeless row is skipped
        ([0.9, 0.05, 0.01, 0.0], Flat(), 1),  # stop where the next level costs more than it brings
        ([0.5, 0.4, 0.3, 0.2], Flat(node=1.0), 0),  # verification is not free: plain decoding is best
    ],
)
def test_the_plan_is_the_best_expected_gain_at_the_price_of_time(survival, costs, depth):
    learned = policy(survival, costs)
    plan = settled(learned, survival)
    assert plan.depth == depth
    rates = [(1 + sum(survival[:d])) / learned.cost(d) for d in range(5)]
    assert plan.depth == max(range(5), key=rates.__getitem__)
    assert learned.price.per_s == pytest.approx(max(rates), rel=0.02)


def test_nothing_is_drafted_beyond_what_may_still_be_emitted():
    for chooser in (policy([0.9, 0.9, 0.9, 0.9], Flat()), FixedPolicy(4, 8)):
        assert chooser.plan(sensed([0.9, 0.9, 0.9, 0.9]), [1]).depth == 0
        assert chooser.plan(sensed([0.9, 0.9, 0.9, 0.9]), [3]).depth <= 2


def test_a_hopeless_row_gets_no_nodes_from_the_others():
    good, bad = sensed([0.9, 0.8, 0.7, 0.6])[0], sensed([0.0, 0.0, 0.0, 0.0])[0]
    learned = policy([0.9, 0.8, 0.7, 0.6], Flat(node=0.02), rows=3)
    plan = learned.plan([good, bad, good], [50, 50, 50])
    assert plan.depth > 0
    assert plan.budget[1] == 0
    assert plan.budget[0] > 0


def evidence(n_kept, reach, rows=1, vocab=7):
    torch.manual_seed(0)
    one = torch.ones(rows, dtype=torch.long)
    return Evidence(
        torch.randn(rows, 5), torch.randn(rows, vocab), one, one * n_kept, one * reach, one * 20, one * 12, one * 4, one
    )


def test_history_ignores_skips_and_starts_anew_with_a_row():
    history, rows = History(2, torch.device("cpu")), torch.tensor([1])
    first = history.update(evidence(n_kept=3, reach=4), rows)
    assert first[0, 2] == pytest.approx(0.5)
    assert torch.equal(history.update(evidence(n_kept=1, reach=0), rows), first)
    assert history.update(evidence(n_kept=1, reach=4), rows)[0, 4] == 0
    fresh = history.update(evidence(n_kept=0, reach=0), rows)
    assert torch.equal(fresh[0], history.start)
    assert torch.equal(history.state[0], history.start)  # the other row was never touched


def test_scalars_are_finite_for_certain_and_for_hopeless_logits():
    case = evidence(2, 4)
    for logits in (torch.zeros(1, 7), torch.tensor([[1e4] + [-1e4] * 6]), torch.tensor([[-1e4, 1e4, *[0.0] * 5]])):
        table = scalars(Evidence(**{**case.__dict__, "logits": logits}), torch.zeros(1, 5))
        assert table.shape == (1, len(SCALARS))
        assert torch.isfinite(table).all()


def test_what_the_host_computes_is_what_the_controller_was_trained_on():
    """Scalars and network of the deployed controller equal those of training, over rounds and changes of request."""
    torch.manual_seed(0)
    embed = torch.randn(7, 5)
    for reads, n_mass, way in (("all", 2, "mean"), ("all", 2, "none"), ("all", 0, "blur"), ("scalars", 0, "none")):
        config = viskip.Config(hidden_size=5, width=16, depth=3, n_mass=n_mass, counterfactual=way, reads=reads)
        head = viskip.Head(config).eval()
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        head.scalar_mean.normal_()
        head.scalar_std.uniform_(0.5, 2.0)
        deployed = viskip.Deployed(head, lambda tokens: embed[tokens], 7)
        learned = make_policy("viskip", Parts(3, 4, Flat(), deployed), {"bias_rate": 0.0})
        learned.open(2, torch.device("cpu"))
        history, rows = History(2, torch.device("cpu")), torch.tensor([0, 1])
        for n_kept, reach in ((0, 0), (3, 4), (1, 0), (1, 4), (5, 5), (0, 0), (2, 3)):
            case = evidence(n_kept, reach, rows=2)
            case = replace(
                case, last_hidden=torch.randn(2, 5), logits=3 * torch.randn(2, 7), roots=torch.tensor([3, 6])
            )
            table = scalars(case, history.update(case, rows))
            learned._chances(learned.sense(case, rows).tolist(), [0, 1])
            got = learned.said[:2]
            with torch.no_grad():
                hazard = head.look(case.last_hidden, embed[case.roots], table).hazard
            assert torch.allclose(torch.tensor(got).float(), 1e-3 + 0.998 * hazard.sigmoid(), atol=1e-4), (
                reads,
                n_kept,
                reach,
            )


def test_a_policy_that_always_skips_goes_to_sleep_and_wakes_for_another_request():
    learned = policy([0.01, 0.0, 0.0, 0.0], Flat())
    asleep = []
    for _ in range(60):
        assert learned.plan(sensed([0.01, 0.0, 0.0, 0.0]), [100]).depth == 0
        asleep.append(not learned.senses)
    assert 0.4 < sum(asleep) / len(asleep) < 0.9
    while learned.senses:
        learned.plan(sensed([0.01, 0.0, 0.0, 0.0]), [100])
    learned.plan([[]], [200])
    assert learned.senses, "it must look at a fresh row"


def test_the_correction_online_follows_what_came_of_the_drafts():
    """A controller that is sure of what never happens is corrected until it skips, and the other way round."""
    good = [0.9, 0.8, 0.7, 0.6]
    learned = make_policy("viskip", Parts(4, 8, Flat(), Told(good)), {"bias_rate": 0.1})
    learned.open(1, torch.device("cpu"))
    row = sensed(good)[0]
    depths = []
    for _ in range(400):
        plan = learned.plan([row], [100])
        depths.append(plan.depth)
        learned.observe(StepTrace(plan, (True,), (0,), (1,), 1 + max(plan.budget)))
        row = [1, plan.depth, *row[2:]]  # nothing was accepted
    assert depths[0] == 4
    assert depths[-1] == 0
    assert learned.met.bias[0] < -1


def rounds(n=600, seed=0):
    """Rounds whose acceptance follows the first component of the state; depth 3 offered."""
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(n, 6, generator=rng)
    q = torch.sigmoid(2.0 * states[:, 0])
    draws = torch.rand(n, 3, generator=rng)
    accepted = (draws < q.unsqueeze(1)).long().cumprod(1).sum(1)
    return {
        "last_hidden": states,
        "root_embed": torch.zeros(n, 6),
        "scalars": torch.zeros(n, 14),
        "accepted": accepted,
        "explored": torch.zeros_like(accepted, dtype=torch.bool),
        "image": torch.arange(len(accepted)),
        "reach": torch.full((n,), 3),
        "visual_mass": torch.full((n, 2), 0.25),
        "visual_mass_valid": torch.ones(n, dtype=torch.bool),
        "dependence": states[:, 1].exp(),
        "changed": (states[:, 2] > 1).float(),
        "dependence_valid": torch.arange(n) % 4 > 0,
    }


def test_the_survival_head_learns_what_decides_acceptance():
    data, held_out = rounds(4000), rounds(seed=1)
    config = viskip.Config(hidden_size=6, width=32, depth=3)
    blank = float(trained(config, data, 0)(held_out).sums["survival_nll"]) / 600
    head = trained(config, data)
    found = head(held_out)
    assert float(found.sums["survival_nll"]) / 600 < 0.9 * blank
    assert float(found.sums["mass_mae"] / found.counts["mass_mae"]) < 0.05
    survival = head.survival(held_out["last_hidden"], held_out["root_embed"], held_out["scalars"])
    assert (survival.diff(dim=1) <= 0).all()
    assert (
        survival[held_out["last_hidden"][:, 0] > 1, 0].mean() > survival[held_out["last_hidden"][:, 0] < -1, 0].mean()
    )


def trained(config, data, steps=60):
    torch.manual_seed(0)
    head = viskip.Head(config)
    head.fit_statistics(data)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(steps):
        objective = head(data)
        optimizer.zero_grad()
        (objective.loss / objective.count).backward()
        optimizer.step()
    return head


def test_the_heads_of_dependence_learn_their_labels_and_a_weight_of_0_teaches_nothing():
    data, held_out = rounds(4000), rounds(seed=1)
    valid = held_out["dependence_valid"]
    errors, ranks = {}, {}
    for weight in (0.0, 1.0):
        config = viskip.Config(
            hidden_size=6, width=32, depth=3, counterfactual="mean", dependence_weight=weight, changed_weight=weight
        )
        head = trained(config, data)
        with torch.no_grad():
            said = head.look(held_out["last_hidden"], held_out["root_embed"], held_out["scalars"])
            estimate = torch.nn.functional.softplus(said.dependence).squeeze(1)
            errors[weight] = float((estimate - held_out["dependence"].log1p())[valid].abs().mean())
            ranks[weight] = metrics.auc(said.changed.squeeze(1)[valid], held_out["changed"][valid] > 0)
        assert float(head(held_out).counts["dependence_huber"]) == int(valid.sum()), "rounds without a label count not"
    assert errors[1.0] < 0.5 * errors[0.0]
    assert ranks[1.0] > 0.9


def test_detached_visual_heads_learn_from_their_labels_alone():
    data = rounds(64)
    grads = {}
    for detach in (False, True):
        torch.manual_seed(0)
        config = viskip.Config(
            hidden_size=6, width=8, depth=3, counterfactual="mean", detach=detach,
            mass_weight=0.0, dependence_weight=0.0, changed_weight=0.0,
        )  # fmt: skip
        head = viskip.Head(config)
        head(data).loss.backward()
        grads[detach] = [head.mass.weight.grad.norm().item(), head.dependence.weight.grad.norm().item()]
    assert min(grads[False]) > 0
    assert grads[True] == [0, 0]


def test_what_no_decision_reads_is_not_deployed_and_what_is_off_is_not_there():
    """The head of changed choices teaches only: the deployed numbers do not depend on it, and hold no copy of it."""
    config = viskip.Config(hidden_size=5, width=16, depth=3, n_mass=2, counterfactual="mean")
    head, embed = viskip.Head(config).eval(), torch.randn(7, 5)
    with torch.no_grad():
        head.changed.weight.fill_(float("nan"))
    deployed = viskip.Deployed(head, lambda tokens: embed[tokens], 7)
    seen = torch.cat(deployed.look(torch.randn(2, 5), torch.tensor([1, 2])), 1).tolist()
    assert np.isfinite(deployed.logits(seen, [[0.0] * 14] * 2)).all()
    assert deployed.last.shape == (16, 3 + 3), "one product for attention, dependence and three levels"
    off = viskip.Head(viskip.Config(hidden_size=5, width=16, depth=3, n_mass=0))
    assert not any(name.startswith(("mass", "dependence", "changed")) for name in off.state_dict())
    assert off.hazard.in_features == 16 + 14
    assert viskip.Deployed(off, lambda tokens: embed[tokens], 7).last.shape == (16, 3)
    with pytest.raises(ValueError, match="counterfactual"):
        viskip.Config(counterfactual="sepia")


def test_a_censored_round_counts_no_failure():
    """All offered tokens accepted: the likelihood must not punish belief in more."""
    head = viskip.Head(viskip.Config(hidden_size=6, width=8, depth=3, n_mass=0))
    base = rounds(4)
    full = {**base, "accepted": torch.full((4,), 2), "reach": torch.full((4,), 2)}
    logits = head.look(full["last_hidden"], full["root_embed"], full["scalars"]).hazard
    expected = -torch.nn.functional.logsigmoid(logits[:, :2]).sum()
    assert head(full).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_prior_is_the_observed_survival():
    head = viskip.Head(viskip.Config(hidden_size=6, width=8, depth=2, n_mass=0))
    data = {**rounds(4), "accepted": torch.tensor([0, 1, 2, 2]), "reach": torch.tensor([2, 2, 2, 2])}
    head.fit_statistics(data)
    assert head.prior.tolist() == pytest.approx([3 / 4, 2 / 4])


def test_recorded_rounds_are_what_the_loop_did():
    target = llava(dtype="float32")
    wanted = [Request(f"r{i}", prompt(target, i, 4), 16, key=100 + i) for i in range(3)]
    recorder = RecordingPolicy(3, 5, target.embed)
    drafter = Head(Config().resolve(target.shape)).drafter(target, 2)
    outputs = generate(target, wanted, drafter, recorder, GreedySampler(), max_batch=2)
    table = recorder.rounds()
    for request, output in zip(wanted, outputs):
        mine = table["key"] == request.key
        drafted = [r for r in output.rounds if r[0] == "draft"]
        assert table["accepted"][mine].tolist() == [min(r[2], r[3]) for r in drafted]
        assert table["n_committed"][mine][0] == len(request.prompt)
        # The state is f_{n-1}: its unembedding chose the root.
        chosen = target.unembed(table["last_hidden"][mine]).argmax(-1)
        assert torch.equal(chosen, table["root"][mine])


def test_what_the_end_of_an_answer_cuts_off_was_not_accepted(monkeypatch):
    target = llava(dtype="float32")
    wanted = [Request("r", prompt(target, 0, 4), 25, key=1)]
    plain = generate(target, wanted, NullDrafter(), SkipPolicy(), GreedySampler())
    truth, tokens = known_answers(wanted, plain), plain[0].tokens
    # Rounds give six tokens each behind the prefill's one: it stops at a draft token that others follow.
    end = next(i for i, token in enumerate(tokens) if tokens.index(token) == i > 0 and (i - 1) % 6 < 4)
    monkeypatch.setattr(target, "stop_ids", frozenset({tokens[end]}))
    oracle = Scripted(truth, lambda true, depth: true, target.shape.vocab_size)
    recorder, traces = RecordingPolicy(5, 5, target.embed), []
    [output] = generate(target, wanted, oracle, recorder, GreedySampler(), traces=traces)
    assert output.tokens == tokens[: end + 1]
    assert output.rounds[-1][2] == 5
    last = traces[-1]
    assert last.accepted == last.emitted == ((end - 1) % 6 + 1,)
    assert recorder.rounds()["accepted"].tolist() == [t.accepted[0] for t in traces]


def test_a_share_of_recorded_rounds_has_any_depth_and_says_so():
    target = llava(dtype="float32")
    wanted = [Request(f"r{i}", prompt(target, i, 4), 24, key=i) for i in range(6)]
    drafter = Head(Config().resolve(target.shape)).drafter(target, 1)

    def recorded(explore, seed="a"):
        recorder = RecordingPolicy(4, 4, target.embed, explore, seed)
        outputs = generate(target, wanted, drafter, recorder, GreedySampler(), max_batch=2)
        return [o.tokens for o in outputs], recorder.rounds(), sum(r[0] == "skip" for o in outputs for r in o.rounds)

    text, table, skips = recorded(0.0)
    assert not table["explored"].any()
    for share in (0.5, 1.0):
        same, found, skipped = recorded(share)
        assert same == text
        assert skipped > skips
        assert set(found["reach"][found["explored"]].tolist()) == {1, 2, 3, 4}
        assert abs(float(found["explored"].float().mean()) - share) < 0.15
        assert not (found["reach"][~found["explored"]] < 4).sum() > len(wanted)  # all but where an answer ends
    assert recorded(0.5)[1]["reach"].equal(recorded(0.5)[1]["reach"])
    assert not recorded(0.5)[1]["reach"].equal(recorded(0.5, "b")[1]["reach"])


def test_other_work_on_the_machine_is_no_cost(monkeypatch):
    now, calls = [0.0], itertools.count()

    def call(key):
        now[0] += key + (10.0 if next(calls) % 3 else 0.0)  # two calls of three are disturbed

    monkeypatch.setattr(tables, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    target = SimpleNamespace(device=torch.device("cpu"))
    assert tables._times(target, call, [1, 2, 5], 7) == pytest.approx({1: 1.0, 2: 2.0, 5: 5.0})


def test_cost_tables_interpolate_survive_a_round_trip_and_never_fall(tmp_path, monkeypatch):
    table = CostTable("here", {1: {1: 1.0, 5: 2.0}, 4: {1: 2.0, 5: 6.0}}, {1: {1: 0.5, 3: 1.5}, 4: {1: 0.5, 3: 1.5}})
    assert table.verify(1, 3) == pytest.approx(1.5)
    assert table.verify(1, 9) == pytest.approx(3.0)
    assert table.verify(2, 1) == pytest.approx(4 / 3)
    assert table.draft(1, 2) == pytest.approx(1.0)
    table.save(tmp_path / "c.json")
    assert CostTable.load(tmp_path / "c.json") == table
    target = llava(dtype="float32")
    drafter = Head(Config().resolve(target.shape)).drafter(target, 2)
    measured = load_or_measure(tmp_path, target, drafter, 2, 3, 5)
    assert load_or_measure(tmp_path, target, drafter, 2, 3, 5) == measured
    assert (tmp_path / f"{hardware(target)}.json").is_file()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
    assert "Z80" in table_path(tmp_path, target).name
    assert not table_path(tmp_path, target).exists(), "another processor measures for itself"
    for row in (*measured.verify_s.values(), *measured.draft_s.values()):
        seconds = [row[k] for k in sorted(row)]
        assert all(s > 0 for s in seconds)
        assert seconds == sorted(seconds)


@pytest.mark.parametrize(
    "damaged",
    ["[]", "{", '{"schema": 3, "hardware": "x", "verify_s": {}}', '{"schema": 3, "verify_s": [1]}', "3", "null"],
)
def test_a_damaged_cost_table_is_measured_again(tmp_path, damaged):
    target = llava()
    drafter = Head(Config().resolve(target.shape)).double().drafter(target, 2)
    path = table_path(tmp_path, target)
    path.write_text(damaged)
    with pytest.raises(ValueError, match=r"measure it again|Expecting"):
        CostTable.load(path)
    assert load_or_measure(tmp_path, target, drafter, 1, 1, 1) == CostTable.load(path)


def test_skip_policy_never_drafts():
    assert SkipPolicy().plan([[]], [50]).budget == (0,)


def rate_of(policy, costs, chance, rounds=2000):
    """Tokens per unit of cost under a drafter whose chain goes on being right with a chance, and the budgets chosen."""
    rng, tokens, spent, chosen = random.Random(0), 0, 0.0, []
    for _ in range(rounds):
        plan = policy.plan([[]], [100])
        n = min(plan.budget[0], plan.depth)
        accepted = next((i for i in range(n) if rng.random() >= chance), n)
        policy.observe(StepTrace(plan, (True,), (accepted,), (accepted + 1,), 1 + n))
        tokens += accepted + 1
        spent += costs.verify(1, 1 + n) + (costs.draft(1, plan.depth) if n else 0)
        chosen.append(n)
    return tokens / spent, chosen


@pytest.mark.parametrize(("chance", "node"), [(0.0, 0.06), (0.1, 0.2), (0.8, 0.06), (0.9, 0.0), (0.5, 0.3)])
def test_the_adaptive_budget_is_close_to_the_best_fixed_one(chance, node):
    costs = Flat(node=node, level=0.0)
    best = max(rate_of(FixedPolicy(16, budget), costs, chance)[0] for budget in (0, 1, 2, 4, 8, 16))
    reached, _ = rate_of(AdaptivePolicy(costs, 16, 16), costs, chance)
    assert reached > 0.95 * best


def test_the_adaptive_budget_follows_a_text_that_changes():
    costs = Flat(node=0.06, level=0.0)
    policy = AdaptivePolicy(costs, 8, 8)
    rate_of(policy, costs, 0.95)
    _, chosen = rate_of(policy, costs, 0.0)
    assert chosen.count(0) > 0.6 * len(chosen)
    _, chosen = rate_of(policy, costs, 0.95)
    assert chosen.count(8) > 0.5 * len(chosen)


def test_the_adaptive_budget_depends_on_the_table_alone():
    """Times of a run are no evidence: two runs with one table make the same plans."""
    costs = Flat(node=0.1, level=0.0)
    assert rate_of(AdaptivePolicy(costs, 6, 6), costs, 0.5) == rate_of(AdaptivePolicy(costs, 6, 6), costs, 0.5)


def test_groups_that_run_empty_are_no_reason_to_draft():
    """Of a batch's last rows a round emits less, whatever its budget: budgets are compared at as many rows."""
    costs, rng = Flat(node=0.06, level=0.0), random.Random(0)
    policy, spent, plain = AdaptivePolicy(costs, 8, 8), 0.0, 0.0
    policy.open(4, torch.device("cpu"))
    for _ in range(150):
        left = [rng.choice([4, 10, 24]) for _ in range(4)]
        plain += max(left) * costs.verify(4, 1)
        while any(left):
            plan, active = policy.plan([[]] * 4, left), tuple(n > 0 for n in left)
            right = [int(n > 0 and budget > 0 and rng.random() < 0.02) for n, budget in zip(left, plan.budget)]
            emitted = tuple(min(k + 1, n) for k, n in zip(right, left))
            left = [n - k for n, k in zip(left, emitted)]
            spent += costs.verify(4, 1 + max(plan.budget))
            policy.observe(StepTrace(plan, active, tuple(right), emitted, 1 + max(plan.budget)))
    assert plain / spent > 0.98


def test_the_last_row_of_a_large_batch_pays_for_all_of_it():
    """Half of the drafts come through: alone that pays for a node, beside fifteen idle rows it does not."""
    for rows, drafted in ((1, True), (16, False)):
        policy = AdaptivePolicy(Flat(node=0.15, level=0.0), 4, 4)
        policy.open(rows, torch.device("cpu"))
        rng, budgets, idle = random.Random(0), [], [0] * (rows - 1)
        for _ in range(600):
            plan = policy.plan([[]] * rows, [100, *idle])
            accepted = next((i for i in range(plan.budget[0]) if rng.random() < 0.5), plan.budget[0])
            active, got = (True, *map(bool, idle)), (accepted, *idle)
            policy.observe(StepTrace(plan, active, got, (accepted + 1, *idle), 1 + plan.budget[0]))
            budgets.append(plan.budget[0])
        assert (sum(budget > 0 for budget in budgets[300:]) > 150) == drafted, rows


class Watching(FixedPolicy):
    """Ends drafts after `levels` levels and prunes below a log-probability; keeps what it was asked."""

    def __init__(self, depth, budget, levels, floor):
        super().__init__(depth, budget)
        self.levels, self.floor, self.asked, self.kept = levels, floor, [], []

    def plan(self, sensed, remaining):
        return replace(super().plan(sensed, remaining), extend=self.extend, prune=self.prune)

    def extend(self, level, scores):
        self.asked.append((level, scores.shape))
        return level < self.levels

    def prune(self, trees):
        self.kept.append((trees.scores > self.floor, trees.depths, trees.parents))
        return pruned(trees, trees.scores > self.floor)


@pytest.mark.parametrize("width", [1, 3])
def test_a_draft_ends_where_the_policy_says_and_pruned_nodes_are_not_verified(width):
    target = llava()
    head = Head(Config().resolve(target.shape)).double().drafter(target, width)
    requests = [Request(str(i), prompt(target, i), 14, i) for i in range(3)]
    plain = generate(target, requests, NullDrafter(), SkipPolicy(), GreedySampler())
    watching, traces = Watching(6, 9, levels=2, floor=-8.0), []
    outputs = generate(target, requests, head, watching, GreedySampler(), max_batch=3, traces=traces)
    assert [output.tokens for output in outputs] == [output.tokens for output in plain]
    assert {level for level, _ in watching.asked} == {1, 2}
    assert {shape for _, shape in watching.asked} == {(3, width)}
    assert max(int(depths.max()) for _, depths, _ in watching.kept) == 2
    drafted = [trace for trace in traces if trace.plan.depth]
    assert len(drafted) == len(watching.kept)
    widths = [1 + int(kept[:, 1:].any(0).sum()) for kept, _, _ in watching.kept]
    assert [trace.n_nodes for trace in drafted] == widths  # scores fall along paths: what is above the floor is closed
    assert min(widths) < max(len(kept[0]) for kept, _, _ in watching.kept)


def test_drawn_candidates_may_not_decide_the_shape_of_their_tree():
    target = llava()
    sampler = KeyedSampler(1.0)
    head = Head(Config().resolve(target.shape)).double().drafter(target, 2, sampler, widths=(2, 1))
    policy = Watching(3, 4, levels=2, floor=-8.0)
    output = generate(target, [Request("r", prompt(target, 0), 6)], head, policy, sampler)[0]
    assert "may not decide the shape" in output.error


def test_a_row_that_looks_at_its_image_is_skipped_and_says_the_same():
    target = llava()
    head = Head(Config().resolve(target.shape)).double().drafter(target, 2)
    requests = [Request(str(i), prompt(target, i, images=i % 2), 12, i) for i in range(6)]
    plain = generate(target, requests, NullDrafter(), SkipPolicy(), GreedySampler())
    actions = {}
    for threshold in (0.0, 0.2, 1.1):
        policy = AttentionPolicy(3, 4, threshold, layer=1)
        outputs = generate(target, requests, head, policy, GreedySampler(), max_batch=3)
        assert [output.tokens for output in outputs] == [output.tokens for output in plain]
        actions[threshold] = [[action for action, *_ in output.rounds[:-1]] for output in outputs]
    assert {action for rounds in actions[0.0] for action in rounds} == {"skip"}  # a share is never below 0
    assert {action for rounds in actions[1.1] for action in rounds} == {"draft"}
    with_image = [action for rounds in actions[0.2][1::2] for action in rounds]
    without = {action for rounds in actions[0.2][::2] for action in rounds}
    assert "skip" in with_image
    assert without == {"draft"}
