"""What the device of a trainer can do at most, and what it holds."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import torch

from torchspec_hpc.config.schema import TrainingConfig

#: Dense peak in TFLOP/s of (bfloat16, float32) by a word of the device's name, from the vendors'
#: data sheets. The first that fits counts. float32 is without TF32, which torch leaves off.
_PEAK_TFLOPS = {
    "H100 PCIe": (756, 51),
    "H100 NVL": (835, 60),
    "H100": (989, 67),
    "H200 NVL": (835, 60),
    "H200": (989, 67),
    "GH200": (989, 67),
    "GB200": (2500, 80),
    "B200": (2250, 75),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L40": (181, 90.5),
    "L4": (121, 30.3),
    "A40": (149.7, 37.4),
    "A10": (125, 31.2),
    "MI300X": (1307, 163.4),
    "MI325X": (1307, 163.4),
}


def peak_flops(config: TrainingConfig, device: torch.device) -> float | None:
    """Floating point operations per second that one rank's device can do at most.

    Args:
        config: ``peak_tflops`` wins over the table; ``compute_dtype`` chooses in it.
        device: Of this rank.

    Returns:
        None for a CPU and for a device that is not in the table: there is no MFU then.
    """
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return known_peak(torch.cuda.get_device_name(device), config.compute_dtype)


def known_peak(name: str, dtype: str) -> float | None:
    """The table's peak in FLOP/s for a device's name; None if it is not there.

    Args:
        name: As CUDA or ROCm gives it, such as ``NVIDIA H100 80GB HBM3``.
        dtype: ``bfloat16`` or ``float32``.
    """
    if re.search(r"\bMIG\b", name):  # a slice of the device
        return None
    for words, (bfloat16, float32) in _PEAK_TFLOPS.items():
        if re.search(rf"\b{words}\b", name):
            return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    return None


def memory_bytes(device: torch.device) -> int:
    """Most memory that tensors have taken so far on a GPU, what the process holds now on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident_pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(resident_pages) * resource.getpagesize()
