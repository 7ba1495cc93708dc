"""An evaluation in Weights & Biases: figures by cell, method and topic, the tidy table, the report, and the files.

Invariant: nothing here asks a question, needs an account or can fail an evaluation, whose files are there already.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eval import tables
from eval.summary import OVERALL
from eval.tasks import PLAIN
from mmspec.login import wandb_mode, wandb_project
from mmspec.types import InputError

FILES = ("summary.json", "report.html", tables.MARKDOWN, tables.CSV)


def check() -> None:
    """Raises InputError where the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the package wandb: pip install 'mmspec-toolkit[train]', or leave it out")


def scalars(summary: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """Of each cell `eval/<method>/<figure>` overall and `eval/<method>/<figure>/<topic>`, where there is one.

    The cell itself is `eval/batch_size`, the x axis of the dashboards, and `eval/temperature`.
    """
    for cell in tables.cells(summary):
        found = {f"eval/{key}": float(cell[key]) for key in ("batch_size", "temperature")}
        found["eval/valid"] = float(cell["valid"])
        for method, entry in cell["methods"].items():
            for topic, figures in {OVERALL: entry[OVERALL], **entry["topics"]}.items():
                behind = "" if topic == OVERALL else f"/{topic}"
                for name in tables.FIGURES:
                    if figures.get(name) is not None:
                        found[f"eval/{method}/{name}{behind}"] = float(figures[name])
        yield found


def log(out: Path, summary: Mapping[str, Any], project: str | None) -> str:
    """Logs a finished evaluation.

    Args:
        out: its folder, with all files.
        summary: what `summary.json` holds.
        project: of W&B; None: `WANDB_PROJECT`, or mmspec.

    Returns:
        One line for the user: where it went, or why it did not.
    """
    mode = wandb_mode()
    if mode == "disabled":
        return "W&B: disabled by WANDB_MODE"
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        how = [name for name in summary["methods"] if name != PLAIN]
        run: Any = wandb.init(
            project=project or wandb_project(),
            name=f"eval {' '.join(how)}"[:120],
            job_type="eval",
            mode=mode,  # type: ignore[arg-type]
            dir=str(out),
            config={key: summary[key] for key in ("run_id", "settings", "versions", "hardware")},
            settings=wandb.Settings(console="off", init_timeout=60),
        )
        run.define_metric("eval/batch_size")
        run.define_metric("eval/*", step_metric="eval/batch_size", summary="last")
        for found in scalars(summary):
            run.log(found)
        run.log({
            "eval/table": wandb.Table(columns=[*tables.FACTS, *tables.FIGURES], data=tables.tidy(summary)),
            "eval/report": wandb.Html((out / "report.html").read_text(encoding="utf-8"), inject=False),
        })  # fmt: skip
        run.summary.update({key: summary[key] for key in ("valid", "primary")})
        artifact = wandb.Artifact(f"eval-{summary['run_id']}", type="evaluation")
        for name in FILES:
            artifact.add_file(str(out / name))
        run.log_artifact(artifact)
        run.finish()
    except Exception as error:
        # Whatever the tracking service does wrong, the evaluation is fine without it.
        return f"no W&B this time ({type(error).__name__}: {' '.join(str(error).split())}); the files are complete"
    return f"W&B: {mode}, project {project or wandb_project()}" + (
        f"; `wandb sync {out / 'wandb'}/offline-run-*` uploads it" if mode == "offline" else ""
    )
