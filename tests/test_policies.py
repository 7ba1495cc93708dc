"""Policies by name: no token changes, plans precede drafts, and what does not pay is neither drafted nor verified."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eval.bench import frozen_copy
from mmspec.drafters.hybrid import HybridDrafter
from mmspec.drafters.null import NullDrafter
from mmspec.drafters.pld import Config, PromptLookupDrafter
from mmspec.drafters.sam import SamDrafter
from mmspec.heads import viskip
from mmspec.loop import generate
from mmspec.policies import Parts, configure, make_policy, policy_names
from mmspec.policies._parts import Price
from mmspec.policies._refine import Refinement, Sureness
from mmspec.policy import FixedPolicy, SkipPolicy
from mmspec.sampling import GreedySampler, make_sampler
from mmspec.tree import best_of_pool, chain, first_nodes, from_parents, pruned
from mmspec.types import InputError, Request, StepTrace
from tests.drafters import HEADS, medusa_head
from tests.test_policy import Flat
from tests.tiny import llava, prompt

CHEAP = Flat(verify=1.0, node=0.005, level=0.01)


def requests(target, n=4, tokens=20):
    return [Request(str(i), prompt(target, i, 5 + i, images=i % 2), tokens, i) for i in range(n)]


def controller(target, depth, sure=0.0):
    """Untrained; `sure` is added to the logit of every level."""
    torch.manual_seed(0)
    config = viskip.Config(width=8, depth=depth, n_mass=1).resolve(target.shape)
    head = viskip.Head(config).to(target.dtype).eval()
    with torch.no_grad():
        head.hazard.bias += sure
    return viskip.Deployed(head.float(), target.embed, target.shape.vocab_size)


def drafters(target):
    torch.manual_seed(1)
    eagle = HEADS["eagle"](target).double().drafter(target, 2)
    return {
        "eagle": eagle,
        "vispec": HEADS["vispec"](target).double().drafter(target, 2),
        "medusa": medusa_head(target).double().drafter(target, 3),
        "sam": SamDrafter(),
        "hybrid": HybridDrafter(PromptLookupDrafter(Config()), eagle, 4, 8, 1),
    }


def parts(target, depth=4, budget=8, sure=2.0):
    return Parts(depth, budget, CHEAP, controller(target, depth, sure))


@pytest.mark.parametrize("drafter", ["eagle", "vispec", "medusa", "sam", "hybrid"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_policy_changes_a_token(drafter, temperature):
    """fp64, batch 1 and ragged 3, every policy by its name, greedy and sampled."""
    target, sampler = llava(), make_sampler(temperature, seed=5)
    plain = generate(target, requests(target), NullDrafter(), SkipPolicy(), sampler)
    chosen = drafters(target)[drafter]
    if drafter == "hybrid":
        chosen.costs = CHEAP
    for name in policy_names():
        policy = make_policy(name, parts(target))
        for batch in (1, 3):
            got = generate(target, requests(target), chosen, policy, sampler, max_batch=batch)
            assert [o.error for o in got] == [None] * len(got)
            assert [o.tokens for o in got] == [o.tokens for o in plain], (name, batch)


def test_a_shallow_draft_is_priced_by_the_nodes_it_can_have():
    """A chain of three has three nodes, whatever the budget; a wide tree soon has them all."""
    assert [Parts(10, 10, width=1).nodes(d) for d in (0, 1, 3, 10)] == [0, 1, 3, 10]
    assert [Parts(5, 7, width=2).nodes(d) for d in (1, 2, 3)] == [2, 6, 7]
    assert Parts(4, 8).nodes(1) == 8
    target, node = llava(), 0.02
    policy = make_policy("viskip", Parts(4, 4, Flat(verify=1.0, node=node, level=0.1), controller(target, 4, 0.5), 1))
    policy.open(1, torch.device("cpu"))
    assert [round(policy.cost(d) - policy.cost(0), 6) for d in (1, 2, 4)] == [0.12, 0.24, 0.48]


class Watched(NullDrafter):
    """Passes everything on, and notes what happened in which order."""

    def __init__(self, drafter, events):
        self.drafter, self.taps, self.events = drafter, drafter.taps, events

    def __getattr__(self, name):
        return getattr(self.drafter, name)

    def open(self, *args):
        self.drafter.open(*args)

    def admit(self, *args):
        self.drafter.admit(*args)

    def evict(self, row):
        self.drafter.evict(row)

    def observe(self, round):
        self.drafter.observe(round)

    def propose(self, roots, plan):
        self.events.append(("draft", sum(n > 0 for n in plan.budget)))
        return self.drafter.propose(roots, plan)


@pytest.mark.parametrize("name", ["attention", "ema", "marginal", "viskip", "viskip_refined"])
def test_plans_are_made_before_any_forward_of_the_drafter_and_a_skip_has_none(name):
    """Passes are counted where the head's block ends: none before the plan of a round, none in a skipped one, and at
    batch 1 as many rows as were not skipped."""
    target = llava()
    head = HEADS["eagle"](target).double()
    drafter, events = head.drafter(target, 2), []
    finish = drafter.head.block.finish

    def finished(residual, attended):
        events.append(("forward", len(residual)))
        return finish(residual, attended)

    drafter.head.block.finish = finished
    dear = Flat(verify=1.0, node=0.02, level=0.4)
    settings = {"threshold": 0.2, "layer": 1} if name == "attention" else None
    policy = make_policy(name, Parts(3, 6, dear, controller(target, 3, 0.5)), settings)
    plan = policy.plan

    def noted(*args):
        made = plan(*args)
        events.append(("plan", sum(n > 0 for n in made.budget) if made.depth else 0))
        return made

    policy.plan = noted
    traces = []
    generate(target, requests(target, 4, 24), Watched(drafter, events), policy, GreedySampler(), traces=traces)
    rounds, current = [], None
    for what, rows in events:
        if what == "plan":
            current = [rows, 0, 0]
            rounds.append(current)
        else:
            assert current is not None, f"a {what} before any plan"
            current[1 if what == "draft" else 2] += rows
    assert len(rounds) == len(traces)
    for planned, drafted, forwards in rounds:
        assert planned == drafted, "rows that the drafter saw = rows not skipped"
        assert (forwards > 0) == (planned > 0)
    kinds = {planned > 0 for planned, _, _ in rounds}
    assert kinds == {True, False} or name == "viskip_refined", "both kinds of round must occur"


def test_the_first_nodes_of_a_tree_are_what_pruning_the_others_leaves():
    torch.manual_seed(0)
    tokens, scores = torch.arange(14).view(2, 7), torch.tensor([[0.0, -1, -2, -1.5, -3, -2.5, -4]] * 2)
    parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 3]] * 2)
    trees = best_of_pool(tokens, parents, scores, (6, 6), 3, with_scores=True)
    for counts in ((6, 6), (3, 3), (4, 1), (0, 2), (0, 0)):
        cut = first_nodes(trees, counts)
        ranks = torch.arange(7).expand(2, -1)
        by_pruning = pruned(trees, ranks <= torch.tensor(counts).unsqueeze(1))
        assert cut.parents.equal(by_pruning.parents)
        assert cut.depths.equal(by_pruning.depths)
        n = cut.tokens.shape[1]
        kept = by_pruning.parents >= 0
        assert cut.tokens[kept].equal(by_pruning.tokens[kept])
        assert n == max(counts) + 1
        assert cut.max_depth >= int(cut.depths.max())


def refinement(costs, rows=1, per_s=1.0, depth=4, budget=6):
    return Refinement(costs, rows, depth, budget, Price(per_s / rows, rows), Sureness())


def test_water_fills_columns_while_their_summed_chances_pay_for_a_wider_pass():
    """Two rows, a node costs 0.1 s a column at one token a second: by hand, columns of 0.9 + 0.05 and 0.2 + 0.04 pay,
    one of 0.06 + 0.03 does not; and nodes that are next to impossible are left out where another row has the column."""

    class Columns:
        def verify(self, batch, nodes):
            return 1.0 + 0.1 * nodes

        def draft(self, batch, depth):
            return 0.0

    refine = refinement(Columns(), rows=2)
    refine.begin(3, [True, True])
    scores = torch.log(torch.tensor([[1.0, 0.9, 0.2, 0.06], [1.0, 0.05, 0.04, 0.03]]))
    trees = replace(chain(torch.arange(8).view(2, 4)), scores=scores)
    assert refine.prune(trees).tokens.shape == (2, 3)
    hopeless = replace(trees, scores=torch.log(torch.tensor([[1.0, 0.9, 0.2, 0.06], [1.0, 1e-4, 1e-5, 1e-6]])))
    cut = refine.prune(hopeless)
    assert (cut.parents >= 0).sum(1).tolist() == [2, 0], "a row's own budget"
    refine.begin(3, [False, True])  # a row that was not planned for has no say
    assert refine.prune(trees).tokens.shape == (2, 1)


def test_a_draft_goes_on_while_a_level_is_worth_its_pass():
    refine = refinement(Flat(verify=1.0, node=0.0, level=0.2))
    refine.sure.hazard = [40.0, 50.0]  # usually 0.8
    refine.begin(4, [True])
    assert refine.extend(1, torch.log(torch.tensor([[0.8, 0.1]])))  # 0.9 x 0.8 for 0.2
    assert refine.extend(2, torch.log(torch.tensor([[0.5, 0.1]])))
    assert not refine.extend(3, torch.log(torch.tensor([[0.1, 0.1]])))  # 0.2 x 0.8
    assert refine.levels == 3
    refine.begin(4, [True], [[0.9, 0.1, 0.1, 0.1]])  # a controller that expects nothing
    assert not refine.extend(1, torch.log(torch.tensor([[0.85, 0.05]])))


def test_a_level_that_does_not_pay_by_itself_pays_by_those_after_it():
    """Verification is often paid for by several nodes at a time."""

    class Steps:
        def verify(self, batch, nodes):
            return 1.0 + 0.5 * (nodes > 2)

        def draft(self, batch, depth):
            return 0.0

    refine = refinement(Steps())
    for chance, later, on in ((0.4, 1.0, True), (0.4, 0.1, False), (0.6, 0.0, True)):
        refine.begin(4, [True], [[0.9, chance, later, later]])
        assert refine.extend(1, torch.log(torch.tensor([[0.9]]))) == on
    refine = refinement(Steps(), rows=2)
    for others, on in ((0.01, False), (0.5, True)):  # a row of the batch may pay for all
        refine.begin(4, [True, True], [[0.9, 0.4, 0.1, 0.1], [0.9, 0.4, 0.9, 0.9]])
        assert refine.extend(1, torch.log(torch.tensor([[0.9], [others]]))) == on


def test_what_a_controller_foresees_decides_how_much_of_a_copy_is_verified():
    """Scores that say 0.8 of every level, whatever comes; a controller that knows which copies end at once."""
    refine = refinement(Flat(verify=1.0, node=0.1, level=0.0), depth=4, budget=4)
    random = torch.Generator().manual_seed(0)
    scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]) * math.log(0.8)
    trees = replace(chain(torch.arange(5).view(1, 5)), scores=scores)
    kept: list[tuple[bool, int]] = []
    for good in (torch.rand(400, generator=random) < 0.5).tolist():
        refine.begin(4, [True], [[0.95 if good else 0.05] * 4])
        nodes = refine.prune(trees).tokens.shape[1] - 1
        kept.append((good, nodes))
        refine.settle(StepTrace(None, (True,), (nodes if good else 0,), (1,), 1 + nodes))
    assert refine.sure.trust < -3
    assert [n for good, n in kept[-100:] if good] == [4] * sum(good for good, _ in kept[-100:])
    assert [n for good, n in kept[-100:] if not good] == [0] * sum(not good for good, _ in kept[-100:])


def test_a_controller_that_foresees_nothing_loses_its_say_over_scores():
    """Scores that know how far each copy comes; a controller that says 0.5 of every level."""
    refine = refinement(Flat(verify=1.0, node=0.1, level=0.0), depth=4, budget=4)
    random = torch.Generator().manual_seed(0)
    for good in (torch.rand(400, generator=random) < 0.5).tolist():
        scores = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]) * math.log(0.95 if good else 0.05)
        refine.begin(4, [True], [[0.5] * 4])
        nodes = refine.prune(replace(chain(torch.arange(5).view(1, 5)), scores=scores)).tokens.shape[1] - 1
        refine.settle(StepTrace(None, (True,), (nodes if good else 0,), (1,), 1 + nodes))
    assert refine.sure.trust > 3
    assert (nodes == 4) == good


def test_of_a_level_that_was_thinned_nothing_is_learned():
    """Two candidates of level 1, one of which is not worth verifying; a chain that is cut has the levels before."""
    refine = refinement(Flat(verify=1.0, node=0.25, level=0.0), depth=2, budget=3)
    trees = replace(
        from_parents(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[-1, 0, 0, 1]]), 2),
        scores=torch.tensor([[1.0, 0.6, 0.2, 0.1]]).log(),
    )
    refine.begin(2, [True], [[0.3, 0.9]])
    assert refine.prune(trees).tokens.shape[1] == 2
    refine.settle(StepTrace(None, (True,), (0,), (1,), 2))
    assert refine.sure.trust == 0.0
    refine = refinement(Flat(verify=1.0, node=0.25, level=0.0), depth=2, budget=3)
    refine.begin(2, [True], [[0.3, 0.1]])
    copied = replace(chain(torch.arange(3).view(1, 3)), scores=trees.scores[:, [0, 1, 3]])
    assert refine.prune(copied).tokens.shape[1] == 2
    refine.settle(StepTrace(None, (True,), (0,), (1,), 2))
    assert refine.sure.trust == pytest.approx(math.log((1 - 0.6) / (1 - 0.3)))


def test_a_draft_that_was_grown_by_what_a_controller_foresees_is_not_weighed_again():
    refine = refinement(Flat(verify=1.0, node=0.25, level=0.0), depth=2, budget=2)
    trees = replace(chain(torch.arange(3).view(1, 3)), scores=torch.tensor([[1.0, 0.9, 0.8]]).log())
    for grown, nodes in ((False, 0), (True, 2)):
        refine.sure.trust = -refine._TRUST
        refine.begin(2, [True], [[0.01, 0.01]])
        if grown:
            refine.extend(1, torch.tensor([[0.9]]).log())
        assert refine.prune(trees).tokens.shape[1] == 1 + nodes
        assert bool(refine._levels) == (not grown)


def test_a_tree_keeps_its_order_when_levels_are_weighed():
    """Two candidates of the first level, one below the better; what is said of a level is shared by its nodes."""
    refine = refinement(Flat(verify=1.0, node=0.0, level=0.0), depth=2, budget=3)
    refine.sure.trust = -refine._TRUST  # the controller's word, but for a fiftieth
    refine.begin(2, [True], [[0.5, 0.1]])
    weighed = refine._weighed([0.6, 0.3, 0.45], [0, 1, 1, 2], [0.5, 0.1])
    assert weighed == pytest.approx([0.6 * 0.5 / 0.9, 0.3 * 0.5 / 0.9, 0.05], rel=0.15)
    assert refine._weighed([], [0, 0, 0, 0], [0.0, 0.0]) == [], "an idle row"


def test_the_sharpness_of_honest_scores_stays_where_it_is():
    """Drafts that are all right or all wrong, as often as they say, are called neither sure nor modest."""
    refine, random = refinement(Flat(node=0.0, level=0.0), depth=3, budget=3), torch.Generator().manual_seed(0)
    seen = []
    for came in (torch.rand(4000, generator=random) < 0.5).tolist():
        refine.begin(3, [True])
        trees = replace(chain(torch.arange(4).view(1, 4)), scores=torch.log(torch.tensor([[1.0, 0.5, 0.5, 0.5]])))
        kept = refine.prune(trees).tokens.shape[1]
        refine.settle(StepTrace(None, (True,), ((kept - 1) * came,), (1,), kept))
        seen.append(refine.sure.sharpness)
    assert 0.9 < sum(seen[1000:]) / len(seen[1000:]) < 1.1


def test_sharpness_follows_drafts_that_are_too_sure_and_too_modest():
    for right, direction in ((0, 1), (3, -1)):
        refine = refinement(Flat(node=0.0, level=0.0), depth=3, budget=3)
        for _ in range(300):
            refine.begin(3, [True])
            trees = replace(chain(torch.arange(4).view(1, 4)), scores=torch.tensor([[0.0, -0.5, -1.0, -1.5]]))
            kept = refine.prune(trees).tokens.shape[1]
            refine.settle(StepTrace(None, (True,), (min(right, kept - 1),), (1,), kept))
        assert (refine.sure.sharpness > 1.5) if direction > 0 else (refine.sure.sharpness < 0.5)


@pytest.mark.parametrize("name", ["marginal", "viskip_refined"])
def test_a_last_small_batch_makes_nobody_forget(name):
    """Ten requests are eight and two, topic after topic. What batches of eight and of two, greedy and sampled, learn of
    time in turn is what each learns alone."""
    target, told = llava(), [1, 0, 20, 12, 4, 1.0, 0.5, 0.3, 0.5, *[0.0] * 8, 1.0, 3.0]

    def policy():
        return make_policy(name, Parts(4, 8, Flat(node=0.02, level=0.05), controller(target, 4, sure=2.0), width=2))

    def decode(policy, rows, sampled):
        policy.open(rows, torch.device("cpu"), sampled)
        for _ in range(5):
            plan = policy.plan([told] * rows, [100] * rows)
            accepted = (min(2, plan.depth),) * rows
            policy.observe(StepTrace(plan, (True,) * rows, accepted, (1,) * rows, 1 + plan.depth))
        return policy.price.per_s / rows, policy.probing.spent_s

    batches, together = ((8, False), (2, False), (8, True)), policy()
    found = [[decode(together, *batch) for batch in batches] for _ in range(3)][-1]
    for batch, (price, spent_s) in zip(batches, found):
        alone = policy()
        assert (price, spent_s) == pytest.approx([decode(alone, *batch) for _ in range(3)][-1], rel=0.05)
        assert spent_s > 15, "three times five rounds, each of which takes more than a second"


@pytest.mark.parametrize("depth", [4, 1])
def test_a_drafter_that_is_always_wrong_is_left_alone_but_for_a_small_share(depth):
    """Of predicted time and what a drafter reads first: no more is lost to a bad one than the share, after a start."""
    costs = Flat(verify=1.0, node=0.05, level=0.2)
    policy = make_policy("marginal", Parts(depth, 8, costs))
    policy.open(1, torch.device("cpu"))
    scores = torch.log(torch.tensor([[1.0, 0.9, 0.8, 0.7]]))[:, : depth + 1]
    spent, rounds = [], 3000
    for _ in range(rounds):
        plan = policy.plan([[]], [100])
        nodes = 1
        if plan.depth:
            sure = replace(chain(torch.arange(scores.shape[1])[None]), scores=scores)
            nodes = plan.prune(sure).tokens.shape[1]
        spent.append(policy.refine.seconds(nodes, plan.depth > 0) + (costs.draft(1, 1) if plan.depth else 0.0))
        policy.observe(StepTrace(plan, (True,), (0,), (1,), nodes))
    assert sum(spent) < 1.02 * rounds * policy.plain_s
    assert sum(spent[rounds // 2 :]) < 1.006 * rounds // 2 * policy.plain_s


def test_what_a_frozen_copy_learns_stays_with_it():
    target = llava()
    for name, learned in (
        ("viskip", lambda p: any(any(met.bias) for met in p._met.values())),
        ("marginal", lambda p: any(pace.probing.spent_s for pace in p._paces.values())),
    ):
        policy = make_policy(name, parts(target))
        twin = frozen_copy(policy)
        generate(target, requests(target), drafters(target)["eagle"], twin, GreedySampler())
        assert learned(twin)
        assert not learned(policy)
        assert twin.price is twin.refine.price, "its parts are each other's, as the original's are"


def test_accepting_less_than_the_threshold_skips_a_row_and_it_is_tried_again():
    policy = make_policy("ema", Parts(4, 8), {"threshold": 0.4, "decay": 0.0, "patience": 3})
    policy.open(2, torch.device("cpu"))
    drafted, left = [], [100, 100]
    for _ in range(12):
        plan = policy.plan([[]] * 2, left)
        drafted.append(tuple(n > 0 for n in plan.budget))
        policy.observe(StepTrace(plan, (True, True), (3, 0), (4, 1), 9))
        left = [left[0] - 4, left[1] - 1]
    assert all(first for first, _ in drafted)
    assert [second for _, second in drafted] == [True, False, False, False] * 3
    for another in (200, 20):  # of row 1: longer than the one before, and shorter than what that one had left
        policy.observe(StepTrace(policy.plan([[]] * 2, [100, 100]), (True, True), (3, 0), (4, 1), 9))
        assert policy.share[1] < 0.4
        policy.plan([[]] * 2, [96, another])
        assert policy.share[1] == 1.0


def test_what_an_idle_row_would_draft_does_not_keep_a_batch_drafting():
    policy = make_policy("confidence", Parts(6, 6), {"threshold": 0.5})
    scores = torch.tensor([[0.3, 0.2], [0.9, 0.1]]).log()
    assert policy.plan([[]] * 2, [100, 100]).extend(1, scores)
    assert not policy.plan([[]] * 2, [100, 0]).extend(1, scores)
    assert not policy.plan([[]] * 2, [100, 1]).extend(1, scores), "a token that is decided anyhow is not drafted"


def test_copies_have_scores_that_say_how_often_such_copies_were_right():
    drafter = SamDrafter()
    for _ in range(50):
        drafter.trust.learn(1, 4, 0)
        drafter.trust.learn(20, 4, 4)
    assert drafter.trust.chance(1) < 0.1
    assert drafter.trust.chance(20) > 0.9
    assert drafter.trust.expected(20, 3) == pytest.approx(sum(drafter.trust.chance(20) ** k for k in (1, 2, 3)))
    before = drafter.trust.chance(1)
    for _ in range(300):
        drafter.trust.learn(1, 0, 0)  # never offered again
    assert drafter.trust.chance(1) > before


def test_unknown_names_and_settings_are_one_line():
    with pytest.raises(InputError, match="marginal"):
        make_policy("marginl", Parts(1, 1))
    with pytest.raises(InputError, match="threshold"):
        configure("ema", {"treshold": 0.2})
    with pytest.raises(InputError, match="controller"):
        make_policy("viskip", Parts(1, 1, CHEAP))


class Late(FixedPolicy):
    """Skips the first rounds of every batch."""

    def __init__(self, depth, budget, first):
        super().__init__(depth, budget)
        self.first, self.round = first, 0

    def plan(self, sensed, remaining):
        self.round += 1
        full = super().plan(sensed, remaining)
        return full if self.round > self.first else replace(full, depth=0, budget=(0,) * len(remaining))


@pytest.mark.parametrize("first", [3, 75])
def test_a_head_that_waited_drafts_what_it_would_have_drafted(first):
    """Skipped rounds leave their pairs in a list that is settled late, and beyond 64 pairs in between: at the same
    length the same tree comes out as of a head that drafted all along. Ragged rows, one of which ends meanwhile."""
    target = llava()
    wanted = [Request(str(i), prompt(target, i, 5 + i), 20 if i == 1 else 110, i) for i in range(3)]
    seen = {}
    for skips in (0, first):
        torch.manual_seed(1)
        drafter = HEADS["eagle"](target).double().drafter(target, 2)
        policy, trees = Late(3, 5, skips), {}
        propose = drafter.propose

        def noted(roots, plan, propose=propose, trees=trees, drafter=drafter):
            tree = propose(roots, plan)
            for row, length in enumerate(drafter.kv.lengths):
                trees[row, length, plan.depth] = tree.tokens[row].tolist(), tree.parents[row].tolist()
            return tree

        drafter.propose = noted
        outputs = generate(target, wanted, drafter, policy, GreedySampler(), max_batch=3)
        assert [o.error for o in outputs] == [None] * 3
        seen[skips] = trees
    both = [key for key in seen[0].keys() & seen[first].keys() if key[1] and (first < 20 or key[0] != 1)]
    assert len(both) > 3, "no context that both drafted at"
    assert all(seen[0][key] == seen[first][key] for key in both)
