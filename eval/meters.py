"""Energy and memory of a stretch of work, where the device tells them.

Invariant: what the device does not tell is None, never 0.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")


class Meter:
    """Reads counters before and after.

    On a GPU: NVML's energy counter of the whole board, if `pynvml` is installed, and the peak of PyTorch's own memory.
    On a CPU: the package counters of `/sys/class/powercap`, where this user may read them, and no memory: the peak of a
    process is that of everything it ever did.

    Args:
        device: of the target.
        rapl: where the counters of CPUs are.
    """

    def __init__(self, device: torch.device, rapl: Path = RAPL) -> None:
        self.device = device
        self._handle = _nvml_handle(device) if device.type == "cuda" else None
        self._packages = [] if device.type == "cuda" else sorted(rapl.glob("intel-rapl:[0-9]"))
        self._start: list[float] | None = None

    def start(self) -> None:
        """Begins a stretch."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._start = self._joules()

    def stop(self) -> tuple[float | None, int | None]:
        """Joules and peak bytes since `start`."""
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        now = self._joules()
        if self._start is None or now is None:
            return None, peak
        spent = [b - a for a, b in zip(self._start, now)]
        # A counter that ran over says nothing about this stretch.
        return (sum(spent) if min(spent) >= 0 else None), peak

    def _joules(self) -> list[float] | None:
        """Counters in joules, or None."""
        if self._handle is not None:
            torch.cuda.synchronize(self.device)
            nvml: Any = importlib.import_module("pynvml")
            return [nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000]
        try:
            return [int((folder / "energy_uj").read_text()) / 1e6 for folder in self._packages] or None
        except (OSError, ValueError):
            return None


def _nvml_handle(device: torch.device) -> Any:
    """NVML's handle of a GPU, None where NVML or its counter is not there."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        return handle
    except ImportError:
        return None
    except Exception as error:  # NVML has an exception class of its own for whatever a driver does not offer
        if type(error).__module__.partition(".")[0] == "pynvml":
            return None
        raise
