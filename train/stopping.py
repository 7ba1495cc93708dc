"""Stopping early without losing work: signals, and launchers that vanish.

Invariant: a stop is a request. Nothing happens inside the handler; loops ask, all ranks agree, state is saved, and only
then does the process end. A second Ctrl-C ends it at once; a second SIGTERM does not, for a scheduler sends it to every
process and the launcher passes its own on (and kills after 30 s what does not end).

SIGTERM to `deepspeed` kills only its runner: the runner's child (`deepspeed.launcher.launch`, the workers' parent)
lives on, and nobody tells the workers. So a worker that was launched by deepspeed watches parent and grandparent.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import psutil

from train.world import World

WATCH_EVERY_S = 1.0
IMPATIENT_S = 0.5
"""Interrupts closer together than this are one key press that arrived by two ways."""


class Stopped(Exception):
    """The run was asked to stop and what it had reached is saved; `signum` is why."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """What a shell reports for this signal."""
        return 128 + self.signum


class Stopper:
    """Collects reasons to stop: call `install` first, then `listen` once there is a group."""

    def __init__(self) -> None:
        self._signum = 0
        self._world: World | None = None
        self._ancestors = launchers()
        self._watched_at = 0.0
        self._interrupted_at: float | None = None

    def install(self) -> None:
        """Turns SIGINT and SIGTERM into requests."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._handle)

    def listen(self, world: World) -> None:
        """From now on a request to one rank is a request to all."""
        self._world = world

    def asked(self) -> int:
        """The signal number of a request to any rank, else 0. No other rank need take part."""
        self._watch()
        world = self._world
        if world is None or world.size == 1:
            return self._signum
        try:
            if self._signum:
                world.store.set("stop", str(self._signum))
            elif world.store.check(["stop"]):
                self._signum = int(world.store.get("stop"))
        except RuntimeError:
            # The rank that holds the store is gone, so this run is over.
            self._signum = self._signum or signal.SIGTERM
        return self._signum

    def check(self) -> None:
        """Raises `Stopped` when there is a request; for loops in which ranks do not wait for each other."""
        signum = self.asked()
        if signum:
            raise Stopped(signum)

    def agreed(self) -> int:
        """The request all ranks know of (the largest signal number), else 0. Every rank must call."""
        signum = self.asked()
        return self._world.largest(signum) if self._world is not None else signum

    def check_together(self) -> None:
        """Raises `Stopped` on every rank when there is a request to any. Every rank must call."""
        signum = self.agreed()
        if signum:
            raise Stopped(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signum == signal.SIGINT and self._interrupted_at is not None and now - self._interrupted_at > IMPATIENT_S:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if signum == signal.SIGINT:
            self._interrupted_at = self._interrupted_at or now
        self._signum = self._signum or signum

    def _watch(self) -> None:
        now = time.monotonic()
        if self._signum or now - self._watched_at < WATCH_EVERY_S:
            return
        self._watched_at = now
        if not all(ancestor.is_running() and ancestor.status() != psutil.STATUS_ZOMBIE for ancestor in self._ancestors):
            self._signum = signal.SIGTERM


def launchers() -> list[Any]:
    """The deepspeed processes above this one: parent (`launch`) and grandparent (the `deepspeed` runner).

    Empty without deepspeed: a plain `nohup python train/distill.py` may outlive its shell. `psutil` compares creation
    times, so a recycled process number does not pass for the launcher.
    """
    found: list[Any] = []
    try:
        process = psutil.Process().parent()
        if process is None or not any("deepspeed.launcher.launch" in word for word in process.cmdline()):
            return found
        found.append(process)
        runner = process.parent()
        if runner is not None and any("deepspeed" in os.path.basename(word) for word in runner.cmdline()[:3]):
            found.append(runner)
    except psutil.Error:
        pass
    return found
