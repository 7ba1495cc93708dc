"""The W&B dashboard of training: acceptance by depth and topic, losses, throughput, the controller's calibration.

    python -m train.dashboard                                 # to the project of who is logged in; else a file
    python -m train.dashboard --entity TEAM --project mmspec  # to another one
    python -m train.dashboard --replace URL                   # brings the view that it made before up to date
    python -m train.dashboard --out training.json             # the view that W&B would get

Invariant: every metric on a panel is logged by a run that trains head and controller, and every one that it logs is on
a panel (tests/test_dashboard.py).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmspec.arguments import command
from mmspec.dashboards import Dashboard, Panel, run
from train.tracking import METRICS, RATES

BOARD = Dashboard(
    "MMSpec training",
    (
        (
            "Acceptance",
            (
                Panel("tau of the decode loop, held-out prompts", ("accept/tau",), y="tokens a round"),
                Panel("tau by topic", ("accept/tau/*",), y="tokens a round"),
                Panel("tau of chains, training data", (METRICS["tau_sim"],), y="tokens a round"),
                Panel("Acceptance by depth, once the depth before is right", ("accept/pos_*",), y="share"),
                Panel("First draft token right", (METRICS["top1"],), y="share"),
                Panel("Answer tokens in the head's own vocabulary", ("train/covered",), y="share"),
            ),
        ),
        (
            "Learning",
            (
                Panel("Loss of the head", ("train/loss",)),
                Panel("Loss of the controller", ("viskip/loss", "viskip/val_loss")),
                Panel("Learning rates", ("train/lr", "viskip/lr")),
                Panel("Gradient norm", ("train/grad_norm",)),
            ),
        ),
        (
            "Throughput",
            (
                Panel("Tokens a second", (RATES["tokens"], RATES["answer_tokens"])),
                Panel("TFLOP/s of all devices", (RATES["tflop"],)),
                Panel("Share of the devices' peak (MFU)", ("perf/mfu",)),
                Panel("Peak memory of a process", ("perf/memory_gb",), y="GB"),
                Panel("Where a step's time goes", ("time/*_s",), y="seconds"),
            ),
        ),
        (
            "Calibration of the controller",
            (
                Panel("Drafts of which nothing is accepted: foreseen and seen", ("viskip/a0_*",), y="share"),
                Panel("The same, held out", ("viskip/val_a0_*",), y="share"),
                Panel("Brier score of the first depth", ("viskip/brier_1", "viskip/val_brier_1")),
                Panel("Survival, negative log-likelihood", ("viskip/survival_nll", "viskip/val_survival_nll")),
                Panel("Visual attention, mean absolute error", ("viskip/mass_mae", "viskip/val_mass_mae")),
                Panel("Everything that the controller logs", ("viskip/*",)),
            ),
        ),
    ),
)


@command("train.dashboard")
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    run("train.dashboard", __doc__ or "", BOARD, "runs/dashboards/training.json", argv)


if __name__ == "__main__":
    sys.exit(main())
