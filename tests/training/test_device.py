from __future__ import annotations

import pytest
import torch

from tests.training.tiny import training_config
from torchspec_hpc.training.device import known_peak, memory_bytes, peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA B200", 2.25e15, 75e12),
        ("NVIDIA GB200", 2.5e15, 80e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("AMD Instinct MI300X", 1307e12, 163.4e12),
        ("NVIDIA A10G", None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ],
)
def test_peaks_by_name(name, bfloat16, float32):
    assert known_peak(name, "bfloat16") == bfloat16
    assert known_peak(name, "float32") == float32


def test_the_configuration_knows_better():
    assert peak_flops(training_config(peak_tflops=1.5), CPU) == 1.5e12
    assert peak_flops(training_config(), CPU) is None


def test_memory_of_a_cpu_is_what_the_process_holds():
    before = memory_bytes(CPU)
    block = torch.ones(64 * 2**20 // 4)
    assert memory_bytes(CPU) - before > 60 * 2**20
    del block
