"""Two threads at most, so that parallel test workers do not fight over two cores; the option --golden; a group."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
