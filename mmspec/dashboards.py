"""Dashboards of Weights & Biases as code: which metrics stand on which panel, for a project or for a file.

Invariant: a panel is its metrics' names; the view that W&B takes is made by W&B's own library and never typed here.
The library is imported when a view is made, and by nothing else: decoding does not need it (tests/test_imports.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmspec.arguments import Parser
from mmspec.login import wandb_mode, wandb_project
from mmspec.types import InputError


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        title: above it.
        metrics: names as they are logged; `*` stands for anything but a slash.
        x: the metric along its x axis; "Step" is W&B's own counter.
        y: what the y axis is called.
    """

    title: str
    metrics: tuple[str, ...]
    x: str = "Step"
    y: str = ""

    @property
    def pattern(self) -> str:
        """A regular expression of whole names, as W&B takes it."""
        return f"^({'|'.join(name.replace('*', '[^/]*') for name in self.metrics)})$"

    def shows(self, name: str) -> bool:
        """Whether a metric of this name is on it."""
        return re.match(self.pattern, name) is not None


@dataclass(frozen=True)
class Dashboard:
    """A view of a project: sections, each a title and its panels, in the order of the page."""

    name: str
    sections: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All of them."""
        return tuple(panel for _, panels in self.sections for panel in panels)


def run(program: str, about: str, board: Dashboard, file: str, argv: Sequence[str] | None = None) -> None:
    """The command of one dashboard: applies it where somebody is logged in, and writes it as a file where not.

    Args:
        program: what it is called as a module.
        about: its docstring, for `--help`.
        board: what it applies.
        file: where it is written without `--out` when nobody is logged in.
        argv: the command line; None is the process's own.

    Raises:
        InputError: the command line is wrong, or what it asks for is not to be had.
    """
    parser = Parser(prog=f"python -m {program}", description=about)
    add = parser.add_argument
    add("--out", metavar="FILE", help=f"write the view as JSON, logged in or not (not logged in: {file})")
    add("--project", default=wandb_project(), metavar="NAME", help="of W&B (default: WANDB_PROJECT, or mmspec)")
    add("--entity", metavar="NAME", help="user or team that the project belongs to (default: who is logged in)")
    add(
        "--replace", metavar="URL", help="a view that was applied before, to be brought up to date (default: a new one)"
    )
    args = parser.parse_args(argv)
    online = wandb_mode() == "online"
    if args.replace and not online:
        raise InputError("--replace needs a login (`wandb login`), and WANDB_MODE unset or online")
    if args.out or not online:
        path = Path(args.out or file)
        write(path, board, args.entity or "", args.project)
        print(f"written: {path}" + ("" if online else " (not logged in to W&B, so applied to no project)"))
    if online:
        print(f"applied: {apply(board, args.entity, args.project, args.replace)}")


def write(path: Path, board: Dashboard, entity: str, project: str) -> None:
    """The view as W&B takes it, as JSON, the same for the same dashboard.

    Raises:
        InputError: W&B's library is missing, or the file cannot be written.
    """
    view = _workspace(board, entity, project)._model.model_dump(mode="json", by_alias=True, exclude_none=True)
    for s, section in enumerate(view["spec"]["section"]["panelBankConfig"]["sections"]):
        for p, panel in enumerate(section["panels"]):
            panel["__id__"] = f"{s}-{p}"  # drawn anew each time, for nothing
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(view, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}") from None


def apply(board: Dashboard, entity: str | None, project: str, replace: str | None) -> str:
    """Saves the view in the project of who is logged in; returns its address.

    Raises:
        InputError: W&B's library is missing, or W&B did not take it.
    """
    _library()
    import wandb
    import wandb_workspaces.workspaces as ws

    try:
        made = _workspace(board, entity or wandb.Api().default_entity or "", project)
        if replace:
            old = ws.Workspace.from_url(replace)
            old.name, old.sections = made.name, made.sections
            made = old
        return str(made.save().url)
    except Exception as error:
        # Its message may repeat the request, headers included: the kind of error has to do.
        raise InputError(
            f"W&B did not take the dashboard ({type(error).__name__}); look at --entity, --project (a first run makes "
            "it), --replace and the login, or write it with WANDB_MODE=offline"
        ) from None


def _library() -> tuple[Any, Any]:
    """W&B's modules of workspaces and of their panels. Raises InputError where they are not installed."""
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise InputError("wandb-workspaces is not installed: pip install 'mmspec-toolkit[train]'") from None
    return workspaces, panels


def _workspace(board: Dashboard, entity: str, project: str) -> Any:
    ws, wr = _library()

    def drawn(panel: Panel) -> Any:
        how = {"title": panel.title, "x": panel.x, "title_y": panel.y or None}
        if any("*" in name for name in panel.metrics):
            return wr.LinePlot(metric_regex=panel.pattern, **how)
        return wr.LinePlot(y=list(panel.metrics), **how)

    sections = [
        ws.Section(name=title, panels=[drawn(panel) for panel in panels], is_open=True)
        for title, panels in board.sections
    ]
    return ws.Workspace(entity=entity, project=project, name=board.name, sections=sections)
