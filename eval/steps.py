"""Long work as commands: each is printed, run once, gone on with after an interruption, and done again when it changed.

Invariant: a step is done when its command, the files it reads and the steps before it are those of the ledger and what
it makes is there. Any number of processes may work through one ledger; no step is done twice at once, not even where
one of them was killed and its step lives on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mmspec import checkpoint
from mmspec.types import InputError

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 120
"""What a stopped training may take to save itself, and what one that goes on gets at least."""
PORT = "PORT"
"""Stands for a free port in a command."""


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: as it is printed and remembered.
        words: what is run.
        makes: a file that exists when it is done.
        after: names of the steps whose results it reads.
        limit_s: it is stopped then, and counts as done when it left `makes`; None: never.
        resume: words to add when it goes on with what an interruption left.
        reads: files that the command names and whose content counts.
        owns: a folder of this step alone; what another command left there is removed.
    """

    name: str
    words: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()
    limit_s: float | None = None
    resume: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    owns: Path | None = None

    def left_s(self, spent_s: float, again: bool) -> float | None:
        """Seconds of the limit that are left; a step that goes on gets enough to save what it has, however late."""
        return None if self.limit_s is None else max(self.limit_s - spent_s, GRACE_S if again else 0.0)


class Ledger:
    """What was done, with which command, in `steps.json`; any number of processes may keep it at once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / "steps.json"

    def _entries(self) -> dict[str, dict[str, Any]]:
        return read_json(self._path) if self._path.is_file() else {}

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[IO[str]]:
        """Waits until no other process is at what `name` stands for, and keeps others from it.

        Yields:
            What holds the lock: a command that gets it keeps it, should this process be killed.
        """
        place = self._folder / "locks" / name.replace(" ", "_")
        place.parent.mkdir(exist_ok=True)
        with place.open("w") as lock:
            # The system lets go of it when all that have it have ended, however they end.
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield lock

    def key(self, step: Step) -> str:
        """Of the command, of the files it reads and of the steps it depends on."""
        entries = self._entries()
        parts = [*step.words, str(step.limit_s), *(str(entries.get(name, {}).get("key")) for name in step.after)]
        parts += [_digest(path, (at := path.stat()).st_size, at.st_mtime_ns) for path in step.reads]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def entry(self, step: Step) -> dict[str, Any] | None:
        """What is known of a step with this very command, or None."""
        found = self._entries().get(step.name)
        return found if found is not None and found["key"] == self.key(step) else None

    def note(self, step: Step, **facts: Any) -> None:
        with self.alone("steps.json"):
            known = self.entry(step) or {"key": self.key(step)}
            checkpoint.write_json(self._path, {**self._entries(), step.name: {**known, **facts}})

    def seconds(self, name: str) -> float:
        return float(self._entries().get(name, {}).get("seconds", 0.0))


@functools.cache
def _digest(path: Path, size: int, changed_ns: int) -> str:
    """Of a file as it was then: a step looks up its key every few seconds, and a head may have gigabytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def perform(step: Step, ledger: Ledger) -> None:
    """Runs a step unless it is done.

    Raises:
        InputError: it failed, or left nothing.
        KeyboardInterrupt: also for SIGTERM and a hangup; what ran was ended first.
    """
    with ledger.alone(step.name) as lock, _interruptible():
        _perform(step, ledger, lock)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes SIGTERM and a hangup what Ctrl-C is: they would end this process and leave its command running, whose
    session is its own."""
    if threading.current_thread() is not threading.main_thread():  # another may not say what signals do
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(signum, signal.default_int_handler)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _perform(step: Step, ledger: Ledger, lock: IO[str]) -> None:
    known = ledger.entry(step)
    if known is not None and known.get("done") and step.makes.exists():
        print(f"== {step.name}: done already", flush=True)
        return
    words = [*step.words, *(step.resume if known is not None else ())]
    before = float(known.get("seconds", 0.0)) if known else 0.0
    print(f"== {step.name}: {' '.join(checkpoint.discreet(word) for word in words)}", flush=True)
    if known is None:
        _remove(step)  # before it is noted: what is noted goes on with what is there
    ledger.note(step, seconds=before)
    start = time.monotonic()
    left_s = step.left_s(before, known is not None)
    code, stopped = _command(words, left_s, lambda spent_s: ledger.note(step, seconds=before + spent_s), lock)
    seconds = before + time.monotonic() - start
    if not step.makes.exists() or (code != 0 and not stopped):
        ledger.note(step, seconds=seconds)
        anew = f", or begins it anew where {step.makes.parent} is removed" if step.resume else ""
        raise InputError(f"{step.name} ended with exit code {code}; the same command again goes on with it{anew}")
    ledger.note(step, seconds=seconds, done=True, stopped=stopped)


def _remove(step: Step) -> None:
    """What an earlier command left; folders that a step does not own are shared and stay."""
    if step.owns is not None and step.owns.is_dir():
        shutil.rmtree(step.owns)
    if step.makes.is_file():
        step.makes.unlink()


def _command(words: Sequence[str], limit_s: float | None, beat: Any, lock: IO[str]) -> tuple[int, bool]:
    """Runs a command to its end or its limit; it has the lock until then, whatever becomes of this process.

    Returns:
        The exit code, and whether it was stopped at the limit.
    """
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # A free port: the launcher's fixed one may be taken by another run on this machine.
    words = [_free_port() if word == PORT else word for word in words]
    env = {**os.environ, "PYTHONPATH": paths}
    process = subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, pass_fds=(lock.fileno(),))
    start = time.monotonic()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=5.0), False
            beat(time.monotonic() - start)
            if limit_s is not None and time.monotonic() - start >= limit_s:
                print(f"   its {limit_s / 60:.0f} minutes are over: it saves what it has", flush=True)
                _stop(process)
                return process.returncode, True
    except BaseException:
        _stop(process)
        raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a command and its workers to end, and waits until all are gone; kills what is left after GRACE_S."""
    end = time.monotonic() + GRACE_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        while time.monotonic() < end:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> str:
    # Only here: most commands need none.
    from torch.distributed.elastic.utils.distributed import get_free_port

    return str(get_free_port())


# ---- what commands say ----


def module(name: str, *words: str) -> tuple[str, ...]:
    """The words that run a module."""
    return (sys.executable, "-m", name, *words)


def launched(procs: int, script: str, *words: str) -> tuple[str, ...]:
    """The words that run a script, by its path from the root, on some processes; one needs no launcher."""
    if procs <= 1:
        return (sys.executable, str(ROOT / script), *words)
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(procs))
    return (*launcher, "--master_port", PORT, str(ROOT / script), *words)


def one_budget(args: argparse.Namespace) -> list[str]:
    """Overrides that make one budget of all recipes, whatever they say themselves.

    Args:
        args: steps, batch (conversations a step), procs, seed and out.
    """
    return [
        f"run.out={args.out}", f"run.seed={args.seed}", f"run.max_steps={args.steps}",
        f"optim.micro_batch={args.batch // max(args.procs, 1)}", "optim.accumulate=1", "policy.kind=fixed",
        "run.eval_every=0", "run.trackers=[]",
    ]  # fmt: skip


def options(args: argparse.Namespace, without: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a command, without places of this machine, what was typed, and those of `without`."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(part) for part in value]
        return checkpoint.discreet(value) if isinstance(value, str) else value

    return {key: plain(value) for key, value in vars(args).items() if key not in ("out", "results", "said", *without)}


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def hardware_line(hardware: Mapping[str, Any]) -> str:
    """The machine of a summary in one line."""
    return ", ".join(f"{key} {value}" for key, value in hardware.items() if value is not None)
