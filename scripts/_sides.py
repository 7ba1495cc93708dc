"""Sides of a comparison, each in a process of its own that stays alive between its turns: time and memory of one do not
depend on the other. Imports torch alone, as a peer's environment has nothing of this project."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def serve(step: Callable[[], Any]) -> None:
    """Runs in a side's process: one step for each line that comes in.

    Each is answered by a line of JSON: seconds, peak_bytes (the most that was resident, less what was resident before),
    and `said`, what the step returned.
    """
    for _ in sys.stdin:
        before = _reset_peak()
        start = time.perf_counter()
        said = step()
        seconds = time.perf_counter() - start
        answer = {"seconds": seconds, "peak_bytes": _status("VmHWM") - before, "said": said}
        print(json.dumps(answer), file=sys.__stdout__, flush=True)


def _reset_peak() -> int:
    """Resident bytes, where the peak starts from now on."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes that Linux counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Side:
    """The process of one side, and what its steps took.

    Args:
        name: for error messages.
        command: of a process that calls `serve`; its settings follow as JSON.
    """

    def __init__(self, name: str, command: Sequence[Path | str], settings: Mapping[str, Any]) -> None:
        self.name = name
        words = [*map(str, command), json.dumps(settings)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answers: list[dict[str, Any]] = []

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the side {self.name!r} ended with exit code {self._process.wait()} instead of a step")
        self.answers.append(json.loads(line))
        return float(self.answers[-1]["seconds"])

    @property
    def counted(self) -> Sequence[dict[str, Any]]:
        """All steps but the first, which allocates the optimizer's state."""
        return self.answers[1:]

    @property
    def peak_bytes(self) -> float:
        """Median over the steps that count."""
        return statistics.median(answer["peak_bytes"] for answer in self.counted)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def optimised(parameters: Sequence[torch.nn.Parameter], loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """A training step: forward, backward, AdamW; returns the loss."""
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-4)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step
