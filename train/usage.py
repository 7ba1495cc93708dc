"""What a training step makes of its devices: share of the peak rate, and memory."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

PEAKS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 TFLOP/s of a device, by what its name contains; the first that fits. Source: the makers' data sheets."""


def peak_tflops(device: torch.device, dtype: str, given: float | None) -> float | None:
    """Peak rate of one device, or None where none is known: on a CPU, of other devices, and in other dtypes.

    Args:
        device: of this rank.
        dtype: what it computes in.
        given: `run.peak_tflops`, which decides where it is set.
    """
    if given is not None or device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return given
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(name: str) -> float | None:
    """The entry of PEAKS for a device of this name."""
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in PEAKS.items() if f" {known} " in words), None)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in GB of 1e9 bytes: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the process held before it became this program.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
