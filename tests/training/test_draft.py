"""From the configuration to how a draft is computed."""

from __future__ import annotations

import pytest
import torch

from tests.training import tiny
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.training.draft import compute_options

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_settings_arrive() -> None:
    options = compute_options(
        tiny.training_config(
            loss_type={"forward_kl": 1.0, "total_variation": 0.5},
            gradient_checkpointing=True,
            loss_chunk_mib=3,
        ),
        CPU,
    )
    assert options.loss.weights == (("forward_kl", 1.0), ("total_variation", 0.5))
    assert options.loss.lk_eta == 3.0
    assert options.gradient_checkpointing
    assert options.loss_chunk_bytes == 3 * 2**20
    assert not options.compiled


def test_compiled_on_gpus_unless_told_otherwise() -> None:
    assert compute_options(tiny.training_config(), GPU).compiled
    assert not compute_options(tiny.training_config(torch_compile=False), GPU).compiled
    assert compute_options(tiny.training_config(torch_compile=True), CPU).compiled


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "allowed"),
    [
        ("flash", CPU, "float32", "auto, sdpa, plain"),
        ("flex_attention", CPU, "bfloat16", "auto, plain"),
        ("sdpa", GPU, "bfloat16", "auto, flash, flash_attn, flex_attention, plain"),
        ("flash", GPU, "float32", "auto, flex_attention, plain"),
    ],
)
def test_a_back_end_that_does_not_work_here(
    backend: str, device: torch.device, dtype: str, allowed: str
) -> None:
    config = tiny.training_config(attention_backend=backend, compute_dtype=dtype)
    with pytest.raises(ConfigError, match=f"attention_backend = {backend} does not work") as error:
        compute_options(config, device)
    assert allowed in str(error.value)


def test_a_package_that_is_not_installed() -> None:
    config = tiny.training_config(attention_backend="flash_attn", compute_dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"needs the package flash-attn") as error:
        compute_options(config, GPU)
    assert "torchspec_hpc[fa]" in str(error.value)
