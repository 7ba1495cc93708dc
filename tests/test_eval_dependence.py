"""Acceptance by visual dependence: what counts as offered, what a decile is, and the whole command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from eval import dependence
from eval.dependence import ACCEPTED, NOT_OFFERED, REJECTED, Answered, deciles, outcomes, table
from eval.plots import Series, standalone
from mmspec import checkpoint
from mmspec.heads._blind import blind_twin
from mmspec.types import Output
from tests.tiny import run_folder


def test_a_token_is_offered_where_the_draft_had_candidates_for_its_place():
    """Two trees: right twice, then without candidates; and wrong at once. The first token nobody drafts."""
    first = ([7, 1, 2, 3, 0], [-1, 0, 0, 1, -1])  # 1 and 2 below the root, 3 below 1, and a padding node
    second = ([4, 9], [-1, 0])
    output = Output("r", [7, 1, 3, 4, 5], "stop", 0.0, 0.0, [("draft", 3, 2, 3), ("draft", 1, 0, 1)])
    said = outcomes(output, [first, second]).tolist()
    assert said == [ACCEPTED, ACCEPTED, NOT_OFFERED, REJECTED]
    skipped = Output("r", [7, 1, 4], "length", 0.0, 0.0, [("skip", 0, 0, 1), ("draft", 1, 0, 1)])
    assert outcomes(skipped, [([1, 9], [-1, 0])]).tolist() == [NOT_OFFERED, REJECTED]


def test_a_place_behind_a_rejected_token_is_never_counted():
    output = Output("r", [7, 5], "stop", 0.0, 0.0, [("draft", 2, 0, 1)])
    assert outcomes(output, [([7, 1, 2], [-1, 0, 1])]).tolist() == [REJECTED]


def test_deciles_are_equal_parts_by_rank():
    kl = torch.rand(100, generator=torch.Generator().manual_seed(0))
    found = deciles(kl)
    assert found.bincount().tolist() == [10] * 10
    assert all(kl[found == k].max() <= kl[found == k + 1].min() for k in range(9))
    assert deciles(torch.zeros(40)).bincount().tolist() == [4] * 10  # ties are split, not lumped
    assert deciles(torch.zeros(3)).max() < 10


def test_ties_fall_into_deciles_by_chance_and_not_by_topic():
    """Of 1,000 equal values the first half has a mean decile of 4.5; 0.3 are three standard errors."""
    found = deciles(torch.zeros(1000))
    assert abs(float(found[:500].double().mean()) - 4.5) < 0.3
    assert torch.equal(found, deciles(torch.zeros(1000)))
    assert not torch.equal(found, deciles(torch.zeros(1000), seed=1))
    kl = torch.arange(1000).flip(0) // 200  # ties mix with nothing else
    assert torch.equal(deciles(kl) // 2, kl)


def test_the_table_finds_where_the_blind_twin_fails():
    """The twin misses the half of the tokens that depends most: gains are 0 below and 1 above, in each topic."""
    answers = []
    for k in range(20):
        kl = torch.arange(50) + 0.01 * k
        seeing = torch.full((50,), ACCEPTED, dtype=torch.int8)
        blind = torch.where(torch.arange(50) < 25, ACCEPTED, REJECTED).to(torch.int8)
        blind[0] = NOT_OFFERED
        answers.append(Answered(f"r{k}", ("a", "b")[k % 2], f"{k}.png", kl, {"seeing": seeing, "blind": blind}))
    found = table(answers, ["seeing", "blind"])
    for rows in (found["overall"], *found["topics"].values()):
        gains = [row["checkpoints"]["blind"]["gain"] for row in rows]
        assert gains == pytest.approx([0.0] * 5 + [1.0] * 5)
        assert all(row["checkpoints"]["seeing"]["acceptance"] == 1 for row in rows)
        assert "gain" not in rows[0]["checkpoints"]["seeing"]
    assert found["overall"][0]["checkpoints"]["blind"]["offered"] == 80
    assert found["zeros"] == 1 / 1000
    assert [row["tokens"] for row in found["overall"]] == [100] * 10
    assert sum(row["tokens"] for row in found["topics"]["a"]) == 500


def test_of_one_image_there_is_no_interval():
    """However many answers are about it; of two images the interval is that of their gains."""
    seeing, blind = torch.full((20,), ACCEPTED, dtype=torch.int8), torch.full((20,), ACCEPTED, dtype=torch.int8)
    blind[10:] = REJECTED

    def answer(topic: str, image: str, outcomes: torch.Tensor) -> Answered:
        return Answered(f"{topic}{image}", topic, image, torch.zeros(20), {"seeing": seeing, "blind": outcomes})

    answers = [answer("lone", "a", blind), answer("lone", "a", seeing)] * 5
    answers += [answer("two", "b", torch.full_like(seeing, REJECTED)), answer("two", "c", seeing)] * 5
    found = table(answers, ["seeing", "blind"])
    for row in found["topics"]["lone"]:
        cell = row["checkpoints"]["blind"]
        assert math.isfinite(cell["gain"])
        assert math.isnan(cell["gain_lo"])
        assert math.isnan(cell["gain_hi"])
    for row in found["topics"]["two"]:
        cell = row["checkpoints"]["blind"]
        assert (cell["gain_lo"], cell["gain_hi"]) == (0.0, 1.0)


def test_a_chart_stands_alone():
    svg = standalone("a < b", [Series("x & y", "m0", [(0.0, 0.5), (1.0, 1.0)])], "x", "y", [0, 1], [0, 1])
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "a &lt; b" in svg
    assert "x &amp; y" in svg


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained head of the embedded target and its twin."""
    from mmspec.targets import load_target

    root = tmp_path_factory.mktemp("heads")
    target = load_target("tiny_llava")
    tree = checkpoint.DraftTree(2, 2, 4)
    seeing = run_folder(root / "seeing", target, tree)
    loaded = checkpoint.load(seeing)
    head = loaded.head()
    twin = blind_twin(type(head))(loaded.config)  # type: ignore[arg-type]
    twin.load_state_dict({**twin.state_dict(), **head.state_dict()})
    checkpoint.save_head(root / "blind", twin.state_dict(), loaded.config, target, blind=True)
    checkpoint.save_tree(root / "blind", tree)
    return seeing, root / "blind"


@pytest.mark.parametrize("way", ["mean", "blur"])
def test_the_command(folders: tuple[Path, Path], tmp_path: Path, way: str):
    words = [w for folder in folders for w in ("--ckpt", str(folder))]
    words += ["--limit", "6", "--max-new-tokens", "12", "--out", str(tmp_path), "--counterfactual", way]
    assert dependence.main(words) == 0
    result = json.loads((tmp_path / "dependence.json").read_text())
    assert result["checkpoints"]["blind"]["blind"]
    assert not result["checkpoints"]["seeing"]["blind"]
    assert len(result["overall"]) == 10
    assert len(result["topics"]) == 6
    lines = [json.loads(line) for line in (tmp_path / "tokens.jsonl").read_text().splitlines()]
    assert sum(len(line["kl"]) for line in lines) == sum(row["tokens"] for row in result["overall"])
    assert all(len(line["kl"]) == len(said) for line in lines for said in line["outcomes"].values())
    assert max(max(line["kl"]) for line in lines) > 0.1  # the embedded target looks
    assert (tmp_path / "dependence.html").read_text().count("<svg") == 1 + len(result["topics"])
    assert str(folders[0]) not in (tmp_path / "dependence.json").read_text()


def test_wrong_input_is_one_line(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    same = ["--ckpt", str(folders[0]), "--ckpt", str(folders[0]), "--out", str(tmp_path)]
    for words, said in ((same, "different names"), ([*same[:2], "--out", str(tmp_path), "--limit", "0"], "--limit")):
        assert dependence.main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
