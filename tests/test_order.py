"""The order of data is a function of the recipe alone: not of processes, nor of where a run began."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmspec.recipe import Source
from mmspec.records import Quarantine
from tests.training import prepare, record, save_data, session
from train.clock import StepClock
from train.corpus import Part, read
from train.order import Order
from train.session import Session
from train.sources import Live, Loader, open_source
from train.world import World


def test_a_seed_names_one_order_for_ever():
    """The literal order: a run that is resumed with another version of a library must go on with the same samples."""
    assert Order([1.0] * 8, 3).batch(0, 8) == [3, 4, 7, 5, 6, 0, 2, 1]
    assert Order([2.0, 0.5, 1.0], 0).batch(1, 7) == [2, 0, 2, 0, 1, 0, 0]


def test_batches_do_not_depend_on_what_was_asked_before():
    weights = [1.0, 0.3, 2.5, 0.7] * 5
    forward = Order(weights, 1)
    expected = [forward.batch(step, 6) for step in range(40)]
    backward, jumping = Order(weights, 1), Order(weights, 1)
    assert [backward.batch(step, 6) for step in reversed(range(40))] == expected[::-1]
    for step in (39, 0, 20, 19, 39, 5):
        assert jumping.batch(step, 6) == expected[step]
    assert expected != [Order(weights, 2).batch(step, 6) for step in range(40)]


def test_a_batch_may_be_longer_than_an_epoch():
    order = Order([1.0] * 3, 0)
    assert order.batch(0, 10) + order.batch(1, 10) == [k for step in range(20) for k in order.batch(step, 1)]


def test_memory_does_not_grow_with_steps_and_epochs():
    order, held = Order([1.0, 1.5] * 500, 0), []
    tracemalloc.start()
    for step in range(4000):
        order.batch(step, 32)
        if step in (200, 3999):
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[1] < held[0] + 2_000


def batches(s: Session, steps: range, size: int, micro: int, accumulate: int) -> list[list[str]]:
    """Names of the samples of each global batch, over all ranks."""
    names: list[list[str]] = [[] for _ in steps]
    s.recipe.optim.micro_batch, s.recipe.optim.accumulate = micro, accumulate
    for rank in range(size):
        mine = replace(s, world=World(rank, size, s.world.device, None))
        with Loader(mine, open_source(mine, ()), StepClock(mine.target.device)) as loader:
            for number, step in enumerate(steps):
                for batch in loader.micro_batches(step):
                    assert len(batch.names) == micro
                    names[number] += batch.names
    return [sorted(batch) for batch in names]


def test_any_number_of_processes_sees_the_same_global_batches_and_resumes_at_any_step(tmp_path: Path):
    data = save_data(tmp_path, [record(number) for number in range(7)])
    (tmp_path / "more").mkdir()
    more = save_data(tmp_path / "more", [record(number + 20) for number in range(3)])
    for number in range(3):
        picture = tmp_path / "more" / "images" / f"{number}.png"
        picture.rename(picture.with_name(f"{number + 20}.png"))
    s = mixture(tmp_path / "run", [Source(str(data), weight=0.6), Source(str(more), weight=2.0)])
    expected = batches(s, range(9), 1, 4, 1)
    for size, micro, accumulate in ((2, 2, 1), (1, 2, 2), (2, 1, 2), (4, 1, 1)):
        assert batches(s, range(9), size, micro, accumulate) == expected
    for begin in (1, 4, 8):
        assert batches(s, range(begin, 9), 2, 2, 1) == expected[begin:]
    drawn = {name.split(" ")[0] for batch in expected for name in batch}
    assert drawn == {f"r{number}" for number in (*range(7), 20, 21, 22)}


def test_any_number_of_workers_makes_the_same_batches(tmp_path: Path):
    s = session(tmp_path, [record(number % 40, turns=1 + number % 3) for number in range(120)], data__answers="given")
    s.prepared = prepare(s)
    order = Order(s.corpus.weights[s.prepared.usable], 0)
    picked = [[s.prepared.usable[position] for position in order.batch(step, 16)] for step in range(30)]
    made = []
    for workers in (1, 4):
        s.recipe.data.workers = workers
        source = Live(s, ())
        made.append([row for records in picked for row in source.batch(records).rows])
    assert len(made[0]) == 480
    for (prompt, answer), (other, marks) in zip(*made):
        assert torch.equal(prompt.input_ids, other.input_ids)
        assert torch.equal(answer, marks)
        assert all(torch.equal(prompt.pixels[name], other.pixels[name]) for name in prompt.pixels)


def test_a_sample_is_decoded_once_for_its_batch_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    s = session(tmp_path, [record(number) for number in range(6)], optim__micro_batch="3")
    s.prepared = prepare(s)
    sample, decoded = Part.sample, []

    def counted(part: Part, number: int) -> object:
        decoded.append(number)
        return sample(part, number)

    monkeypatch.setattr(Part, "sample", counted)
    with Loader(s, Live(s, ()), StepClock(s.target.device)) as loader:
        (batch,) = loader.micro_batches(0)
        loader.settle()
    assert len(decoded) == 2 * 3, "of this step and the one that is prepared ahead"
    assert len(batch.names) == 3
    assert set(batch.names) <= {f"r{number} (data.json:{number + 1})" for number in range(6)}


def mixture(folder: Path, sources: list[Source]) -> Session:
    """A session over several sources, with the answers of their files."""
    s = session(folder, [record(0)], data__answers="given")
    s.recipe.data.sources = sources
    s.corpus = read(sources, Quarantine(None))
    s.prepared = prepare(s)
    return s


@pytest.mark.parametrize("seed", [0, -1, 2**40])
def test_any_integer_is_a_seed(seed: int):
    assert sorted(Order([1.0] * 5, seed).batch(0, 5)) == list(range(5))
