"""Two threads at most, so that parallel test workers do not fight over two cores; the option --golden; a group, and
trainings in it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from train.world import World, join

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the files of tests/golden anew instead of comparing")


@pytest.fixture(scope="session")
def group() -> Iterator[World]:
    """A process group of this process alone; one for all tests, for DeepSpeed keeps the first that it sees."""
    before = dict(os.environ)
    made = join("cpu")
    os.environ.clear()
    os.environ.update(before)
    yield made
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def train_here(group: World) -> Callable[..., None]:
    """`train/distill.py WORDS` in the tests' process and group, without the seconds that a process takes to start; it
    ends with `code`, or the test fails.

    Signal handlers of this process come back, and the group stays.
    """

    # Only here: most tests train nothing.
    from train import distill, run

    def train(*words: str | Path, code: int = 0) -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LOCAL_RANK", "0")
                patch.setenv("WANDB_MODE", "disabled")
                patch.setattr(run, "join", lambda device: group)
                patch.setattr(run, "_leave", lambda world: None)
                assert distill.main(list(map(str, words))) == code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return train
