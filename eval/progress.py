"""The progress bar of an evaluation: requests done, running MAT and speedup."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eval.bench import Result
from eval.summary import number
from eval.tasks import PLAIN


class Running:
    """A bar with the figures of the primary method so far.

    Args:
        console: drawn on.
        total: requests.
        primary: method.
        label: stands in front.
    """

    def __init__(self, console: Console, total: int, primary: str, label: str = "decoding") -> None:
        self.primary = primary
        self.kept = self.rounds = 0
        self.seconds = {PLAIN: 0.0, primary: 0.0}
        # Refreshed by hand between groups: a refreshing thread would run on the cores that are being timed.
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
        )
        self.bar = self.progress.add_task(label, total=total, figures="")

    def update(self, results: Sequence[Result], total: int, n_quarantined: int) -> None:
        """Take in one finished group."""
        mine = [result for result in results if result.method == self.primary]
        for result in mine:
            self.kept += len(result.output.tokens) - 1
            self.rounds += len(result.output.rounds)
        for name in self.seconds:
            self.seconds[name] += next(result.group_s for result in results if result.method == name)
        words = f"MAT {number(ratio(self.kept, self.rounds))}"
        words += f" speedup {number(ratio(self.seconds[PLAIN], self.seconds[self.primary]))}x"
        words += f" quarantined {n_quarantined}"
        self.progress.update(self.bar, advance=len(mine), total=total, figures=words, refresh=True)


def ratio(numerator: float, denominator: float) -> float | None:
    """A ratio for the progress bar, None before there is one."""
    return numerator / denominator if denominator else None
