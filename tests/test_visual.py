"""Labels of rounds: by hand from two passes, whichever way the image is taken away, and the same after a stop."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mmspec import dependence, metrics
from mmspec.heads import eagle
from mmspec.types import COUNTERFACTUALS
from tests import training
from tests.contract.test_heads import dialogue
from tests.test_dependence import naive
from tests.tiny import llava, prompt
from train import controller
from train.visual import Labels, agreement, mass_layers

LEARNED = {"policy__kind": "learned", "policy__rollouts": "6", "data__max_new_tokens": "12"}


def rolled(tmp_path: Path, way: str):
    records = [training.record(number) for number in range(6)]
    s = training.session(tmp_path, records, **LEARNED, policy__controller__counterfactual=way)
    s.prepared = training.prepare(s)
    head = eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False)
    return s, head


@pytest.mark.parametrize("way", COUNTERFACTUALS)
def test_a_label_is_the_mean_divergence_where_the_next_four_tokens_are_chosen(tmp_path: Path, way: str):
    """Of a real rollout: the answer read twice in plain words, positions counted by hand."""
    s, head = rolled(tmp_path, way)
    controller.rollout(s, head)
    rounds = controller._gather(s)
    mean, layers = controller.image_mean(s), mass_layers(s.target.shape.n_layers, 1)
    checked = 0
    for turn in [turn for chunk in controller._chunks(s) for turn in chunk]:
        rows = (rounds["key"] == turn.index).nonzero().flatten()
        tokens = []  # lossless: the rollout emitted the target's own answer
        whole, n_prompt = answered(s, turn, tokens)
        marks = torch.cat([torch.zeros(n_prompt), torch.ones(len(tokens))]).long()
        other = answered(s, turn, tokens, blur=True)[0] if way == "blur" else whole
        unseen = s.target.teacher([other], [marks], instead=mean if way == "mean" else None, hidden=way == "knockout")
        seen = s.target.teacher([whole], [marks], mass_layers=layers)
        mass = seen.visual_mass[0]
        kl, _, changed = naive(s.target.unembed(seen.last_hidden[0]), s.target.unembed(unseen.last_hidden[0]))
        for row in rows.tolist():
            n = int(rounds["n_committed"][row])
            places = list(range(n, min(n + 4, len(whole) - 1)))
            assert bool(rounds["dependence_valid"][row]) == bool(rounds["visual_mass_valid"][row]) == bool(places)
            assert float(rounds["dependence_now"][row]) == pytest.approx(float(kl[n - 1]), abs=1e-4)
            if places:
                assert float(rounds["dependence"][row]) == pytest.approx(float(kl[places].mean()), abs=1e-4)
                assert bool(rounds["changed"][row]) == bool(changed[places].any())
                # Of the same states: that of the last token chose none that was emitted.
                assert rounds["visual_mass"][row].tolist() == pytest.approx(mass[places].mean(0).tolist(), abs=1e-5)
                checked += 1
    assert checked > 6
    assert rounds["dependence"].max() > 1e-3, "an image matters to this target"
    assert set(agreement(rounds)) == {"rank_correlation_0"}


def answered(s, turn, tokens, blur=False):
    """The prompt of a turn, continued by the greedy answer, and its own length; fills `tokens` where it is empty."""
    prompt = controller._prompt(s, turn, blur)
    if not tokens:
        from mmspec.drafters.null import NullDrafter
        from mmspec.loop import generate
        from mmspec.policy import SkipPolicy
        from mmspec.sampling import GreedySampler
        from mmspec.types import Request

        [output] = generate(s.target, [Request("0", prompt, 12, 0)], NullDrafter(), SkipPolicy(), GreedySampler())
        tokens += output.tokens
    return controller._continued(prompt, tokens), len(prompt)


def test_stopped_rollouts_go_on_to_the_same_labels(tmp_path: Path):
    s, head = rolled(tmp_path, "mean")
    controller.rollout(s, head)
    whole = controller._gather(s)
    chunk = next(iter(sorted((s.folder / "rollout").iterdir())))
    kept = chunk.stat().st_mtime_ns
    for path in sorted((s.folder / "rollout").iterdir())[1:]:
        path.unlink()
    controller.rollout(s, head)
    assert chunk.stat().st_mtime_ns == kept
    for name, tensor in controller._gather(s).items():
        assert torch.equal(tensor, whole[name]), name
    shutil.rmtree(s.folder / "rollout")


def test_what_is_hidden_is_the_image_and_from_answers_alone():
    """States before the answer are those of the whole pass; behind it the image can be any other one."""
    target = llava()
    whole, answer = dialogue(target, n_turns=1)
    seen = target.teacher([whole], [answer])
    hidden = target.teacher([whole], [answer], hidden=True)
    first = int(answer.nonzero()[0]) - 1  # the state that chose the answer's first token does not see it either
    assert torch.allclose(seen.last_hidden[0, :first], hidden.last_hidden[0, :first])
    assert (seen.last_hidden[0, first:] - hidden.last_hidden[0, first:]).abs().max() > 1e-3
    two = [dialogue(target, n_turns=1), dialogue(target, images=2)]
    both = target.teacher([p for p, _ in two], [a for _, a in two], hidden=True)
    for k, (p, a) in enumerate(two):
        alone = target.teacher([p], [a], hidden=True).last_hidden[0]
        assert torch.allclose(both.last_hidden[k, : len(p)], alone, atol=1e-9)
    blank, marks = dialogue(target, images=0)
    a, b = (target.teacher([blank], [marks], hidden=way).last_hidden for way in (False, True))
    assert torch.allclose(a, b, atol=1e-9), "without an image there is nothing to hide"
    with pytest.raises(ValueError, match="pack"):
        target.teacher([whole], [answer], hidden=True, pack=64)
    with pytest.raises(ValueError, match="either"):
        dependence.of_conversations(target, [whole], [answer], torch.zeros(1), hidden=True)


def test_a_request_without_an_image_has_no_label():
    target = llava()
    labels = Labels(target, (1,), "knockout", None)
    rounds = {"accepted": torch.tensor([1]), "n_committed": torch.tensor([6])}
    labels.begin(rounds)
    labels.fill(rounds, torch.tensor([0]), prompt(target, 1, 9, images=0), 6)
    assert not rounds["dependence_valid"].any()
    assert not rounds["visual_mass_valid"].any()


def test_rank_correlation_and_auc_by_hand():
    x = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert metrics.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert metrics.rank_correlation(x, -x) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 and 3, 0, 1, 2.
    assert metrics.rank_correlation(x, torch.tensor([9.0, 0.0, 1.0, 2.0])) == pytest.approx(-1.5 / (4.5 * 5) ** 0.5)
    assert metrics.rank_correlation(x, torch.ones(4)) != metrics.rank_correlation(x, torch.ones(4))
    right = torch.tensor([True, False, True, False])
    assert metrics.auc(torch.tensor([0.9, 0.1, 0.5, 0.5]), right) == pytest.approx(3.5 / 4)
    assert metrics.auc(x, torch.zeros(4, dtype=torch.bool)) != 0.5
