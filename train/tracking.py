"""Where a run's numbers go: metrics.jsonl always, Weights & Biases beside it, one progress bar for the eye.

Invariant: nothing here asks a question, needs an account or can fail a run; only rank 0 writes.
"""

from __future__ import annotations

import json
import netrc
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

WANDB_CLOSE_S = 20.0


class Tracker:
    """Logs scalars and tables of one run.

    Args:
        folder: the run folder.
        name: the run's name.
        settings: what the W&B page shows as config.
        active: False on ranks above 0, where every method does nothing.
        record: whether metrics and W&B are written; otherwise there is only the progress bar.
        resume_id: W&B id of the run that goes on, or None.
    """

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], active: bool, record: bool, resume_id: str | None
    ) -> None:
        self.folder, self.active, self.record = folder, active, active and record
        self.bar: Any = None
        self.wandb_id: str | None = None
        self._wandb: Any = None
        self._began = time.monotonic()
        if self.record:
            self._open_wandb(name, settings, resume_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One record: `step` counts head steps first and controller steps after them."""
        if not self.record:
            return
        record = {"step": step, "wall_s": round(time.monotonic() - self._began, 3), **values}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._send(lambda run: run.log(dict(values), step=step))

    def table(self, step: int, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of text, and the same in `<name>.jsonl`."""
        if not self.record:
            return
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"step": step, **dict(zip(columns, row))}, ensure_ascii=False) + "\n")

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

        self._send(send)

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
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                os.replace(temporary, path)

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
        """Ends bar and W&B run, in bounded time: a stopped run must not wait for a service that was killed with it."""
        self.end_progress()
        if self._wandb is None:
            return
        run, self._wandb = self._wandb, None

        def finish() -> None:
            try:
                run.finish()
            except Exception as error:
                print(f"distill: W&B did not close cleanly ({type(error).__name__}); metrics.jsonl is complete")

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(WANDB_CLOSE_S)

    def _send(self, call: Callable[[Any], None]) -> None:
        """Tells W&B, as long as its service lives: the launcher ends that too when it ends the workers."""
        if self._wandb is None:
            return
        try:
            call(self._wandb)
        except Exception as error:
            self._wandb = None
            print(f"distill: W&B is gone ({type(error).__name__}); metrics.jsonl goes on", flush=True)

    def _open_wandb(self, name: str, settings: Mapping[str, Any], resume_id: str | None) -> None:
        mode = wandb_mode()
        if mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self._wandb = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mmspec"),
                name=name,
                id=resume_id,
                resume="allow" if resume_id else None,
                mode=mode,  # type: ignore[arg-type]
                dir=str(self.folder),
                config=dict(settings),
                settings=wandb.Settings(console="off", init_timeout=60),
            )
            self.wandb_id = self._wandb.id
        except Exception as error:
            # Whatever the tracking service does wrong, the training itself is fine without it.
            print(f"distill: no W&B this time ({type(error).__name__}: {error}); metrics.jsonl is written all the same")


def wandb_mode() -> str:
    """WANDB_MODE if set; else online for who is logged in (key in the environment or netrc), offline for others."""
    wanted = os.environ.get("WANDB_MODE")
    if wanted:
        return wanted if wanted in ("online", "offline", "disabled", "shared") else "offline"
    return "online" if _logged_in() else "offline"


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (netrc.NetrcParseError, OSError):
        return False
