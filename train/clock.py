"""Where the time of a training step goes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch


class StepClock:
    """Splits a step into named phases that follow each other: host clock on a CPU, events on the stream of a GPU.

    On a GPU a phase is what the device did or waited for in it, whatever the host was ahead; the events of a step are
    resolved at its end by one sync, where its metrics are fetched anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def enter(self, phase: str) -> None:
        """From now on time belongs to this phase."""
        self._marks.append((phase, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds by phase since the first one was entered; the clock starts anew."""
        marks, self._marks = [*self._marks, ("", self._now())], []
        if self._cuda:
            marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (phase, begin), (_, end) in itertools.pairwise(marks):
            passed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            seconds[phase] = seconds.get(phase, 0.0) + passed
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
