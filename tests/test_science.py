"""Does vision help to predict draftability? The figures by hand, and data in which the truth is known either way."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import pytest
import torch

from eval.science import Rounds, answer, compared, figures, markdown, survival_nll, verdict
from eval.summary import OVERALL
from eval.verdicts import OPEN
from mmspec import metrics
from mmspec.heads import eagle
from mmspec.heads.viskip import Config, Head
from mmspec.policy import SCALARS
from mmspec.recipe import Optim
from mmspec.types import InputError
from scripts import ablate_viskip
from tests import training
from train import ablate, controller

OPTIM = Optim(lr=1e-2, weight_decay=0.01, micro_batch=256, clip=1.0)


def test_the_likelihood_of_a_round_by_hand():
    logits = torch.tensor([[0.9, 0.5, 0.2], [0.9, 0.5, 0.2], [0.9, 0.5, 0.2]]).logit()
    nats = survival_nll(logits, torch.tensor([0, 2, 2]), torch.tensor([3, 3, 2]))
    by_hand = [-math.log(0.1), -math.log(0.9 * 0.5 * 0.8), -math.log(0.9 * 0.5)]  # the last one is censored at 2
    assert nats.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_the_likelihood_is_the_loss_that_controllers_are_trained_on():
    torch.manual_seed(0)
    head = Head(Config(hidden_size=4, width=8, depth=3, n_mass=0))
    accepted, reach = torch.tensor([0, 1, 2, 3, 2]), torch.tensor([3, 3, 2, 3, 3])
    rounds = {
        "last_hidden": torch.randn(5, 4), "root_embed": torch.randn(5, 4), "scalars": torch.randn(5, len(SCALARS)),
        "accepted": accepted, "reach": reach,
    }  # fmt: skip
    with torch.no_grad():
        logits = ablate.said(head, rounds, torch.arange(5))
        assert float(survival_nll(logits, accepted, reach).sum()) == pytest.approx(float(head(rounds).loss), rel=1e-5)


def test_a_difference_of_means_draws_images_and_says_so_when_there_is_none():
    noise = torch.Generator().manual_seed(0)
    first = torch.rand(400, generator=noise)
    images = [k // 4 for k in range(400)]
    gain, p = metrics.mean_difference(first, first + 0.1 + 0.2 * torch.rand(400, generator=noise), images)
    assert gain.value == pytest.approx(0.2, abs=0.02)
    assert 0.1 < gain.lo < gain.value < gain.hi < 0.3
    assert p < 0.001
    gain, p = metrics.mean_difference(first, first[torch.randperm(400, generator=noise)], images)
    assert gain.lo < 0 < gain.hi
    assert p > 0.01
    whole, _ = metrics.mean_difference(first, first + 1, [0] * 400)
    assert whole.value == pytest.approx(1)
    assert math.isnan(whole.lo)
    shared = torch.randn(100, generator=noise).repeat_interleave(4)  # rounds of an image that say one thing
    by_image, _ = metrics.mean_difference(first, first + shared, images)
    by_round, _ = metrics.mean_difference(first, first + shared, range(400))
    assert by_image.hi - by_image.lo > 1.5 * (by_round.hi - by_round.lo)


def rounds(n_images, each, kind, seed=0):
    """Rounds in which the first component of `kind` (the visual label, or the state) decides acceptance."""
    noise = torch.Generator().manual_seed(seed)
    n = n_images * each
    label = torch.rand(n, generator=noise) * 3
    state = torch.randn(n, 6, generator=noise)
    decides = {"label": label - 1.5, "state": state[:, 0]}[kind]
    draws = torch.rand(n, 3, generator=noise)
    return {
        "last_hidden": state, "root_embed": torch.zeros(n, 6), "scalars": torch.zeros(n, len(SCALARS)),
        "accepted": (draws < torch.sigmoid(2.0 * decides).unsqueeze(1)).long().cumprod(1).sum(1),
        "reach": torch.full((n,), 3), "visual_mass": torch.rand(n, 2, generator=noise),
        "visual_mass_now": torch.rand(n, 2, generator=noise),
        "visual_mass_valid": torch.ones(n, dtype=torch.bool), "dependence": label.expm1(),
        "dependence_now": torch.rand(n, generator=noise), "changed": torch.zeros(n),
        "dependence_valid": torch.ones(n, dtype=torch.bool),
    }, [str(k // each) for k in range(n)]  # fmt: skip


def judged(tmp_path: Path, kind: str, names: tuple[str, ...]):
    table, images = rounds(120, 6, kind)
    plan = ablate.Plan(Config(hidden_size=6, width=16, depth=3, counterfactual="mean"), OPTIM, 60, 3, 1)
    variants = {name: ablate.VARIANTS[name] for name in names}
    calls: list[int] = []
    logits = ablate.predictions(table, images, plan, tmp_path, variants, lambda: calls.append(1))
    seen = Rounds(table["accepted"], table["reach"], [("odd", "even")[int(k) % 2] for k in images], images)
    return logits, seen, {name: survival_nll(x, seen.accepted, seen.reach) for name, x in logits.items()}, calls


def test_what_decides_is_found_and_what_does_not_is_not(tmp_path: Path):
    """Where the label decides, being told it helps and the state does not, and the other way round."""
    for kind, told, state in (("label", "helps", "no difference found"), ("state", "no difference found", "helps")):
        logits, seen, nats, calls = judged(tmp_path / kind, kind, ("whole", "told the labels", "no state"))
        assert len(calls) == 9
        pairs = {
            "told the labels": (nats["told the labels"], nats["whole"]), "no state": (nats["whole"], nats["no state"])
        }  # fmt: skip
        rows = {row["without"]: row for row in compared(pairs, seen, [OVERALL], 0)}
        harmless = {"harms", "no difference found"}  # a useless input may cost a little
        for name, wanted in (("told the labels", told), ("no state", state)):
            said = verdict(rows[name])
            assert said == wanted if wanted == "helps" else said in harmless, (kind, name, rows[name])
        better = "told the labels" if kind == "label" else "whole"
        mine, blank = figures(logits[better], seen), figures(logits["constant"], seen)
        assert mine["survival_nll"] < blank["survival_nll"]
        assert mine["auc"] > 0.8
        assert blank["ece_1"] < 0.06, "the share itself is honest"
        assert {row["topic"] for row in compared(pairs, seen, seen.names(), 0)} == {OVERALL, "odd", "even"}


def test_finished_parts_are_kept_and_another_rollout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = judged(tmp_path, "state", ("whole",))[0]
    monkeypatch.setattr(ablate, "fitted", lambda *_: pytest.fail("it was trained already"))
    again = judged(tmp_path, "state", ("whole",))[0]
    assert torch.equal(first["whole"], again["whole"])
    ablate.claim(tmp_path, {"rounds": "a"})
    ablate.claim(tmp_path, {"rounds": "a"})
    with pytest.raises(InputError, match="another rollout"):
        ablate.claim(tmp_path, {"rounds": "b"})
    with pytest.raises(InputError, match="no rollout"):
        ablate.read_rounds(tmp_path)
    with pytest.raises(InputError, match="too few"):
        ablate.dealt(["a", "b", "b"], 3, 0)


def test_no_image_is_on_both_sides():
    images = [f"i{k % 23}" for k in range(200)]
    fold = ablate.dealt(images, 4, 1)
    assert sorted(fold.unique().tolist()) == [0, 1, 2, 3]
    for number in range(4):
        inside = {images[k] for k in (fold == number).nonzero().flatten().tolist()}
        assert not inside & {images[k] for k in (fold != number).nonzero().flatten().tolist()}


def test_blank_inputs_are_blank_and_labels_are_told_to_one_variant_alone():
    table, _ = rounds(4, 2, "label")
    table["scalars"] = torch.ones_like(table["scalars"])
    config = Config(hidden_size=6, width=8, depth=3, counterfactual="mean")
    _, mine = ablate.dressed(config, ablate.VARIANTS["no visual scalars"], table)
    assert mine["scalars"].sum(1).tolist() == [len(SCALARS) - 3] * 8
    assert table["scalars"].min() == 1, "the others' are untouched"
    _, mine = ablate.dressed(config, ablate.VARIANTS["no state"], table)
    assert mine["last_hidden"].abs().max() == 0
    told, mine = ablate.dressed(config, ablate.VARIANTS["told the labels"], table)
    assert told.n_scalars == mine["scalars"].shape[1] == len(SCALARS) + 4
    assert all(
        ablate.dressed(config, v, table)[0].n_scalars == len(SCALARS) for v in list(ablate.VARIANTS.values())[:-1]
    )


def test_a_logistic_regression_finds_what_decides():
    table, images = rounds(60, 5, "label")
    zero = table["accepted"] == 0
    blank, told = (
        ablate.logistic(x, zero, images, 3) for x in (table["last_hidden"], table["dependence"].log1p()[:, None])
    )
    assert float(told.mean()) < float(blank.mean()) - 0.1


def test_of_a_single_image_nothing_is_said():
    seen = Rounds(torch.tensor([0, 1]), torch.tensor([1, 1]), ["t", "t"], ["a", "a"])
    [row] = compared({"x": (torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.6]))}, seen, [OVERALL], 0)
    assert row["gain"] == pytest.approx(0.4)
    assert verdict(row) == OPEN


def test_the_page_says_it_in_words(tmp_path: Path):
    logits, seen, nats, _ = judged(tmp_path, "label", ("whole", "told the labels"))
    pairs = {"no visual heads": (nats["told the labels"], nats["whole"])}
    rows = compared(pairs, seen, seen.names(), 0)
    said = answer(rows, "the visual heads")
    assert said[0].startswith("Overall: the visual heads: helps (+")
    models = [{"model": n, "topic": t, **figures(x, seen, t)} for n, x in logits.items() for t in seen.names()]
    labels = [{"topic": OVERALL, "n": 3, "dependence": 0.5, "changed": math.nan, "ranks": [0.25]}]
    page = markdown({
        "command": "c", "commit": "x", "machine": "m", "how": "h", "logistic_how": "l", "answer": said,
        "models": models, "ablations": rows, "vision": rows, "logistic": rows, "labels": labels, "rank_names": ["r"],
    })  # fmt: skip
    assert "\n\n| topic | rounds | a = 0 |" in page, "a table begins behind an empty line"
    assert "|\n\n## Labels" in page
    assert "| even |" in page
    assert "| 0.500 | - | 0.25 |" in page
    assert json.dumps(rows)


def test_the_whole_command_on_a_real_rollout(tmp_path: Path):
    """A random target and head: labels, all variants, JSON and page; a second call trains nothing."""
    records = [{**training.record(n), "topic": ("odd", "even")[n % 2]} for n in range(16)]
    wanted = {"policy__kind": "learned", "policy__rollouts": "16", "policy__controller__counterfactual": "mean"}
    s = training.session(tmp_path, records, **wanted)
    s.prepared = training.prepare(s)
    head = eagle.Head(eagle.Config().resolve(s.target.shape)).eval().requires_grad_(False)
    controller.rollout(s, head)
    places = {"run": s.folder, "out": tmp_path / "parts", "results": tmp_path / "results"}
    arguments = argparse.Namespace(**places, folds=2, seeds=1, steps=2)
    ablate_viskip.ablate(s, arguments)
    found = json.loads((tmp_path / "results" / "science.json").read_text())
    assert {row["model"] for row in found["models"]} == {*ablate.VARIANTS, ablate.CONSTANT}
    assert {row["topic"] for row in found["vision"]} == {OVERALL, "odd", "even"}
    assert len(found["logistic"]) == 6 * 3
    assert found["answer"][0].startswith(("Yes", "No"))
    assert found["settings"]["folds"] == 2
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*.safetensors")}
    assert len(parts) == 2 * len(ablate.VARIANTS)
    ablate_viskip.ablate(s, arguments)
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    with pytest.raises(InputError, match="another folder"):
        ablate_viskip.ablate(s, argparse.Namespace(**places, folds=3, seeds=1, steps=2))
