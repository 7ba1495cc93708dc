"""Two threads at most, so that parallel test workers do not fight over two cores; and the option --golden."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the files of tests/golden anew instead of comparing")
