"""Where a run's numbers go: metrics.jsonl always, Weights & Biases or TensorBoard beside it, one progress bar.

Invariant: nothing here asks a question, needs an account or can fail a run; only rank 0 writes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mmspec.files import write_text
from mmspec.login import wandb_mode, wandb_project
from mmspec.types import InputError

CLOSE_S = 20.0
METRICS = {"tau_sim": "accept/tau_sim", "top1": "accept/top1"}
"""Names that sums of a head's objective are logged under; `pos_<k>` become `accept/pos_<k>`, others `train/<sum>`."""
RATES = {"tokens": "perf/tokens_per_s", "answer_tokens": "perf/answer_tokens_per_s", "tflop": "perf/tflops"}
"""Sums of an objective that are logged per second of a step, not per position."""


class Tracker:
    """Logs scalars and tables of one run.

    Args:
        folder: the run folder.
        name: the run's name.
        settings: what the W&B page shows as config.
        active: False on ranks above 0, where every method does nothing.
        record: whether metrics are written and trackers told; otherwise there is only the progress bar.
        resume_id: W&B id of the run that goes on, or None.
        trackers: who is told, as in `run.trackers`.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        active: bool,
        record: bool,
        resume_id: str | None,
        trackers: Sequence[str] = ("wandb",),
    ) -> None:
        self.folder, self.active, self.record = folder, active, active and record
        self.bar: Any = None
        self.wandb_id: str | None = None
        self._sinks: list[Sink] = []
        self._began = time.monotonic()
        if self.record:
            self._open(name, settings, resume_id, trackers)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One record: `step` counts head steps first and controller steps after them."""
        if not self.record:
            return
        record = {"step": step, "wall_s": round(time.monotonic() - self._began, 3), **values}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._tell(lambda sink: sink.scalars(step, values))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of text, and the same in `<name>.jsonl`."""
        if not self.record:
            return
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **dict(zip(columns, row))}, ensure_ascii=False) + "\n")
        self._tell(lambda sink: sink.table(step, name, columns, rows))

    def logged(self, step: int, name: str) -> bool:
        """Whether a record of a step has a scalar."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if self.record and path.is_file() else []
        return any(entry["step"] == step and name in entry for entry in map(json.loads, lines))

    def settle(self) -> None:
        """What was logged is on disk: a checkpoint must not outlast the curve that led to it."""
        path = self.folder / "metrics.jsonl"
        if self.record and path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Takes back what was logged after a step, because the run goes on from there."""
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if self.record and path.is_file():
                lines = path.read_text(encoding="utf-8").split("\n")
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
                # Killed in here, a run must not lose the curve that it goes on with.
                write_text(path, "".join(line + "\n" for line in kept))
        self._tell(lambda sink: sink.rewind(step))

    def progress(self, what: str, total: int, done: int, unit: str) -> None:
        """Replaces the progress bar by one for the next phase."""
        if self.active:
            self.end_progress()
            self.bar = tqdm(total=total, initial=done, desc=what, unit=unit, dynamic_ncols=True, mininterval=1.0)

    def advance(self, n: int = 1, **shown: Any) -> None:
        """Moves the bar on; `shown` appears behind it."""
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update(n)

    def end_progress(self) -> None:
        """Closes the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text: str) -> None:
        """One line for the user, above the progress bar."""
        if self.active:
            tqdm.write(text)

    def close(self) -> None:
        """Ends bar and trackers, in bounded time: a stopped run must not wait for a service that was killed with it."""
        self.end_progress()
        sinks, self._sinks = self._sinks, []

        def finish() -> None:
            for sink in sinks:
                try:
                    sink.close()
                except Exception as error:
                    print(f"distill: {sink.name} closed with {type(error).__name__}; metrics.jsonl is complete")

        if sinks:
            thread = threading.Thread(target=finish, daemon=True)
            thread.start()
            thread.join(CLOSE_S)

    def _tell(self, call: Callable[[Sink], None]) -> None:
        """Tells every tracker, as long as it lives: the launcher ends its service too when it ends the workers."""
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                print(f"distill: {sink.name} is gone ({type(error).__name__}); metrics.jsonl goes on", flush=True)

    def _open(self, name: str, settings: Mapping[str, Any], resume_id: str | None, trackers: Sequence[str]) -> None:
        if "tensorboard" in trackers:
            self._sinks.append(TensorBoard(self.folder / "tensorboard"))
        mode = wandb_mode()
        if "wandb" not in trackers or mode == "disabled":
            return
        try:
            wandb = WandB(self.folder, name, settings, resume_id, mode)
        except Exception as error:
            # Whatever the tracking service does wrong, the training itself is fine without it.
            print(f"distill: no W&B this time ({type(error).__name__}: {error}); metrics.jsonl is written all the same")
            return
        self._sinks.append(wandb)
        self.wandb_id = wandb.id


class Sink(Protocol):
    """A tracker that is told what metrics.jsonl holds."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None: ...
    def rewind(self, step: int) -> None:
        """Forget what was told of later steps, where it can be forgotten."""

    def close(self) -> None: ...


SUMMARIES = {"accept/*": "max", "train/loss": "min", "viskip/*": "last", "time/*": "mean", "perf/*": "mean"}
"""What W&B's table of runs shows of a curve. Its panels are grouped by what stands before the first slash."""


class WandB:
    """A Weights & Biases run."""

    name = "W&B"

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], resume_id: str | None, mode: str) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        self._run: Any = wandb.init(
            project=wandb_project(),
            name=name,
            id=resume_id,
            resume="allow" if resume_id else None,
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=dict(settings),
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        self.id: str = self._run.id
        for metric, summary in SUMMARIES.items():
            self._run.define_metric(metric, summary=summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def rewind(self, step: int) -> None:
        """A run that goes on under its id takes no earlier step: what was told stays."""

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in a folder of the run.

    Raises:
        InputError: the package is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        check_trackers(["tensorboard"])
        self._folder = folder
        self._writer = self._open(None)

    def _open(self, purge_step: int | None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=purge_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            # Its names know no spaces; it would say so each time.
            self._writer.add_scalar(name.replace(" ", "_"), value, step)

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) for row in rows]
        self._writer.add_text(name, "\n".join(lines), step)

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(step + 1)

    def close(self) -> None:
        self._writer.close()


def check_trackers(names: Sequence[str]) -> None:
    """Whether what `run.trackers` names is installed, as far as it is no part of the [train] extra.

    Raises:
        InputError: it is not.
    """
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "run.trackers names tensorboard, which is not installed: pip install 'mmspec-toolkit[tensorboard]', or "
            "leave it out"
        )
