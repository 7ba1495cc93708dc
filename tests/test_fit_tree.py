"""Fitting a static tree: counts against the loop itself, what is written, and every wrong input in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from mmspec import checkpoint
from mmspec.drafters.recycling import Config
from mmspec.heads import eagle
from mmspec.loop import generate
from mmspec.policy import FixedPolicy
from mmspec.sampling import GreedySampler
from mmspec.static_tree import StaticTree
from mmspec.types import Plan, Request
from scripts import fit_tree
from tests import tiny
from tests.drafters import HEADS, make_head
from tests.test_eval import records_in, write_records
from tests.training import save_target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, records and a run folder with an untrained head."""
    root = tmp_path_factory.mktemp("fit")
    save_target(root / "target")
    data = root / "data"
    data.mkdir()
    write_records(data, records_in(data))
    target = tiny.llava(dtype="float32")
    config = eagle.Config().resolve(target.shape)
    torch.manual_seed(0)
    checkpoint.save_head(root / "run", eagle.Head(config).state_dict(), config, target)
    checkpoint.save_tree(root / "run", checkpoint.DraftTree(4, 3, 6))
    return root


def fit(place: Path, *words: str) -> int:
    common = ["--target", str(place / "target"), "--data", str(place / "data"), "--max-new-tokens", "30"]
    return fit_tree.main([*common, "--device", "cpu", *words])


def test_a_tree_for_token_recycling(place, tmp_path, capsys):
    out = tmp_path / "trees" / "recycling.json"
    assert fit(place, "--method", "recycling", "--budget", "12", "--batch-size", "3", "--out", str(out)) == 0
    written = json.loads(out.read_text())
    tree = StaticTree.load(out)
    assert Config(tree=str(out)).budget == tree.budget <= 12
    assert written["expected_tau"] > 1
    assert written["fitted_to"]["data"] == "data"
    assert str(place) not in out.read_text()
    assert "usual" in capsys.readouterr().out


def test_a_tree_for_a_head_leaves_its_run_folder_as_it_was(place):
    before = {path.name: path.read_bytes() for path in (place / "run").iterdir()}
    assert fit(place, "--ckpt", str(place / "run"), "--depth", "3") == 0
    assert StaticTree.load(place / "run" / "static_tree.json").depth <= 3
    assert checkpoint.load(place / "run").tree == checkpoint.DraftTree(4, 3, 6)
    assert {name: (place / "run" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("kind", HEADS)
def test_ranks_of_a_head_are_those_its_drafter_gives(kind):
    """An answer that follows a path of the drafter's tree is counted with the ranks of that path."""
    target, width = tiny.llava(), 4
    head = make_head(kind, target, seed=1).eval().requires_grad_(False)
    request, root = Request("r", tiny.prompt(target, 3, 5), 5), 9
    drafter = head.drafter(target, width)
    drafter.open(1, 64)
    with torch.inference_mode():
        forward = target.prefill(target.open(1, 64), 0, request.prompt, head.taps)
        drafter.admit(0, request, forward, torch.tensor(root))
        tree = drafter.propose(torch.tensor([root]), Plan(2, (width + width**2,)))
    # The tree has every candidate, and children of one parent in the order they were created in: best first.
    below = [(tree.parents[0] == node).nonzero().flatten().tolist() for node in range(width + 1)]
    for first, second in itertools.product(range(width), repeat=2):
        child = below[0][first]
        answer = tree.tokens[0, [0, child, below[child][second]]].tolist()
        counts = fit_tree.Counts(3)
        fit_tree.count_head(head, target, request, answer, counts)
        # The second token, too, has once been the first behind a root: there the child was.
        assert counts.trials.tolist() == [2, 1, 0]
        assert counts.hits[1].nonzero().flatten().tolist() == [second]
        counts = fit_tree.Counts(1)
        fit_tree.count_head(head, target, request, answer[:2], counts)
        assert counts.hits[0].nonzero().flatten().tolist() == [first]


def test_counts_of_recycling_agree_with_what_the_loop_accepted():
    """With all ranks of the tree measured, a round that accepts a node has counted a hit at its depth."""
    target = tiny.llava()
    wanted = [Request(f"r{i}", tiny.prompt(target, i, 5), 40, i) for i in range(4)]
    counts = fit_tree.Counts(7)
    drafter = fit_tree.CountingRecycler(target, counts)
    outputs = generate(target, wanted, drafter, FixedPolicy(6, 80), GreedySampler(), 2)
    rounds = [r for o in outputs for r in o.rounds]
    # Rounds at which a request ended are not observed.
    for depth in range(6):
        offered = sum(accepted >= depth for _, _, accepted, _ in rounds)
        assert offered - len(wanted) <= int(counts.trials[depth]) <= offered
        accepted_here = sum(accepted > depth for _, _, accepted, _ in rounds)
        assert int(counts.hits[depth].sum()) >= accepted_here - len(wanted)
    assert int(counts.hits[0, 0]) > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one of the arguments --ckpt --method is required"),
        (("--method", "recycling"), "--out FILE"),
        (("--method", "eagle", "--out", "x.json"), "invalid choice"),
        (("--method", "recycling", "--out", "x.json", "--budget", "0"), "--budget must be at least 1, got 0"),
        (("--method", "recycling", "--out", "/proc/none/x.json"), "/proc/none cannot be written"),
        (("--ckpt", "/nowhere/at/all"), "checkpoint /nowhere/at/all does not exist"),
        (("--method", "recycling", "--out", "x.json", "--data", "synth:none"), "unknown data 'synth:none'"),
    ],
)
def test_wrong_input_is_one_line(words, said, capsys):
    assert fit_tree.main(list(words)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("fit_tree: error: ")
    assert said in error
    assert "\n" not in error
