"""Whether this machine is logged in to Weights & Biases: asked of environment and netrc, never of a person.

Invariant: a key is looked for, and neither read out, kept nor printed.
"""

from __future__ import annotations

import netrc
import os
from pathlib import Path


def wandb_project() -> str:
    """Where runs and dashboards go: WANDB_PROJECT, or mmspec."""
    return os.environ.get("WANDB_PROJECT") or "mmspec"


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
