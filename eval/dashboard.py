"""The W&B dashboard of evaluations: MAT, speedup with its interval, exact_match and skip rate, by batch size and topic.

    python -m eval.dashboard                                 # to the project of who is logged in; else a file
    python -m eval.dashboard --entity TEAM --project mmspec  # to another one
    python -m eval.dashboard --replace URL                   # brings the view that it made before up to date
    python -m eval.dashboard --out evaluation.json           # the view that W&B would get

It shows what `python -m eval.mmspec --wandb` logs.

Invariant: every metric on a panel is logged by an evaluation (tests/test_dashboard.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmspec.arguments import command
from mmspec.dashboards import Dashboard, Panel, run


def _panel(title: str, *names: str, y: str = "") -> Panel:
    """A chart of figures of every method by batch size."""
    return Panel(title, names, x="eval/batch_size", y=y)


BOARD = Dashboard(
    "MMSpec evaluation",
    (
        (
            "Over all requests",
            (
                _panel("MAT (tau)", "eval/*/mat", y="tokens a round"),
                _panel("Speedup", "eval/*/speedup", y="times plain decoding"),
                _panel("Speedup, 95% interval", "eval/*/speedup", "eval/*/speedup_lo", "eval/*/speedup_hi"),
                _panel("Exact match", "eval/*/exact_match", y="share of answers"),
                _panel("Rounds that drafted nothing", "eval/*/skip_rate", y="share"),
                _panel("Throughput", "eval/*/tokens_per_s", y="tokens a second"),
            ),
        ),
        (
            "By topic",
            (
                _panel("MAT (tau) by topic", "eval/*/mat/*", y="tokens a round"),
                _panel("Speedup by topic", "eval/*/speedup/*", y="times plain decoding"),
                _panel("Exact match by topic", "eval/*/exact_match/*", y="share of answers"),
                _panel("Rounds that drafted nothing, by topic", "eval/*/skip_rate/*", y="share"),
            ),
        ),
    ),
)


@command("eval.dashboard")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run("eval.dashboard", __doc__ or "", BOARD, "runs/dashboards/evaluation.json", argv)


if __name__ == "__main__":
    sys.exit(main())
