"""What rounds say on paper: depths by hand, fits of a known truth, and the command on a real run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import decisions, dependence, foresight, tune_tree
from eval.foresight import Paper, Round
from eval.tasks import Dialogues
from mmspec.checkpoint import DraftTree
from mmspec.records import RecordError
from mmspec.targets import load_target
from scripts import fit_tree
from tests import tiny

COST_S = (1.0, 1.2, 1.4, 1.6)


def some(accepted: int, image: int, foreseen: tuple[float, ...] = (0.5, 0.5, 0.5), sure: float = 0.5) -> Round:
    scores = tuple(math.log(sure) * level for level in (1, 2, 3))
    return Round(f"{image:04}.png", foreseen, scores, accepted)


def test_rates_and_hindsight_by_hand():
    paper = Paper([some(3, 0), some(0, 1)], COST_S)
    assert paper.rate(np.array([3, 3])) == pytest.approx((4 + 1) / 3.2)
    assert (paper.single() == 3).all()
    assert paper.hindsight().tolist() == [3, 0]
    assert paper.rate(paper.hindsight()) == pytest.approx((4 + 1) / 2.6)
    assert paper.usual().tolist() == pytest.approx([0.5, 1 - 1e-4, 1 - 1e-4])
    gain = paper.gain(paper.hindsight())
    assert gain.value == pytest.approx(3.2 / 2.6)
    assert paper.gain(paper.single()).value == 1.0


def test_plans_follow_what_is_foreseen_and_drafts_their_scores():
    rounds = [some(3, 0, (0.99, 0.99, 0.99), 0.99), some(0, 1, (0.01, 0.01, 0.01), 0.01)] * 20
    paper = Paper(rounds, COST_S)
    assert paper.ahead(paper.foreseen).tolist() == [3, 0] * 20
    along = paper.along(paper.sure, np.full((40, 3), 0.9))
    assert along.tolist() == [3, 1] * 20, "scores are not there before the first level"


def test_a_level_is_drafted_for_those_after_it():
    paper = Paper([some(3, 0), some(1, 1)], (1.0, 1.0, 1.5, 1.5))
    chances = np.array([[0.9, 0.9, 0.9], [0.9, 0.2, 0.1]])
    assert paper.along(chances, chances).tolist() == [3, 1]


def test_the_fit_finds_the_truth_on_the_other_half():
    """Scores that are too sure by a known exponent, and a controller that knows the half of it."""
    rng = np.random.default_rng(0)
    hidden, seen = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3))
    truth = 1 / (1 + np.exp(-(1.0 + hidden + 0.5 * seen)))
    accepted = (rng.random((4000, 3)) < truth).cumprod(1).sum(1)
    sure = 1 / (1 + np.exp(-2.0 * (1.0 + hidden)))
    rounds = [
        Round(f"{i:04}.png", tuple(1 / (1 + np.exp(-s))), tuple(np.log(p).cumsum()), int(a))
        for i, (s, p, a) in enumerate(zip(seen, sure, accepted))
    ]
    paper = Paper(rounds, COST_S)
    alone, both = paper.fitted(paper.sure), paper.fitted(paper.sure, paper.foreseen)
    assert np.abs(both - truth).mean() < 0.02
    assert paper.nll(both) < paper.nll(alone) < paper.nll(np.broadcast_to(paper.usual(), truth.shape))
    assert paper.nll(alone) < paper.nll(paper.sure)
    assert paper.nll(both) == pytest.approx(paper.nll(truth), abs=0.01)


def test_rounds_of_one_image_are_fitted_on_and_drawn_together():
    """All drafts about one image come true and none about the other: either is foreseen by what the other was like."""
    rounds = [some(3, 0), some(0, 1)] * 20
    paper = Paper(rounds, COST_S)
    first = paper.fitted(paper.sure)[:, 0]
    assert (first[::2] < 0.1).all()
    assert (first[1::2] > 0.9).all()
    gain = paper.gain(paper.hindsight())
    assert (gain.lo, gain.hi) == pytest.approx((1.0, 1.6)), "one image twice, or the other"
    assert math.isnan(Paper([some(3, 0), some(0, 0)], COST_S).gain(np.array([3, 0])).lo)


def test_outcomes_that_nothing_tells_are_worth_nothing_but_in_hindsight():
    rng = np.random.default_rng(1)
    rounds = [some(int(a), i) for i, a in enumerate((rng.random((3000, 3)) < 0.6).cumprod(1).sum(1))]
    rows = {row["known"]: row for row in foresight.figures(rounds, COST_S)}
    assert rows["the controller"]["gain"] <= 1 + 1e-9
    assert rows["both"]["gain"] == pytest.approx(1, abs=0.02)
    assert rows["all outcomes"]["gain_lo"] > 1.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.run_folder(tmp_path_factory.mktemp("runs") / "run", load_target("tiny_llava"), DraftTree(4, 2, 8))


def test_the_command_compares_what_may_be_known(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    seen: list[Round] = []
    judge = foresight.figures
    monkeypatch.setattr(foresight, "figures", lambda rounds, cost_s: seen.extend(rounds) or judge(rounds, cost_s))
    out = tmp_path / "some" / "foresight.json"
    words = ["--ckpt", str(folder), "--offer", "2", "--limit", "6", "--max-new-tokens", "12", "--out", str(out)]
    assert foresight.main(words) == 0
    assert "| the draft's scores |" in capsys.readouterr().out
    assert all(one.image.endswith(".png") for one in seen)
    assert len({one.image for one in seen}) <= 6, "later turns are about the image of the first"
    found = json.loads(out.read_text())
    assert list(found["temperatures"]) == ["0", "1"]
    for part in found["temperatures"].values():
        rows = {row["known"]: row for row in part["rows"]}
        assert list(rows) == ["the best single depth", "the controller", "the draft's scores", "both", "all outcomes"]
        assert rows["all outcomes"]["gain"] >= max(1.0, *(row["gain"] for row in rows.values())) - 1e-9
        assert len(part["cost_s"]) == 3
        assert part["rounds"] > 6
    assert str(folder) not in out.read_text()


def test_what_is_wrong_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bare = tiny.run_folder(tmp_path / "bare", load_target("tiny_llava"), DraftTree(2, 1, 2))
    (bare / "viskip.safetensors").unlink()
    (bare / "viskip.json").unlink()
    assert foresight.main(["--ckpt", str(bare)]) == 2
    assert "has no controller" in capsys.readouterr().err
    assert foresight.main(["--ckpt", str(folder), "--offer", "4", "--limit", "2", "--max-new-tokens", "4"]) == 2
    assert "fewer than two images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (foresight.main, ["--out", "foresight.json"]),
        (tune_tree.main, ["--out", "best.json", "--grid", "2,1,2"]),
        (fit_tree.main, ["--out", "tree.json"]),
        (dependence.main, ["--out", "where"]),
        (decisions.main, ["--out", "page.html", "--max-batch", "1"]),
    ],
)
def test_this_command_and_others_stop_where_the_target_takes_too_few_records(
    command: Callable[[list[str]], int], words: list[str], folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    """Here none, so that nothing is decoded."""

    def refuse(*_: Any) -> None:
        raise RecordError("prompt longer than the context: turn 1 has 9 tokens")

    monkeypatch.setattr(Dialogues, "_encode", refuse)
    monkeypatch.chdir(tmp_path)
    given = ["--ckpt", str(folder), "--data", "synth:testmini", "--limit", "2", "--max-new-tokens", "4"]
    assert command([*given, "--device", "cpu", *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "2 of 2 records are unusable (100.0%, allowed 5.0%), most often (2x): prompt longer" in last
