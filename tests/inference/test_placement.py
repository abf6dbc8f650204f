"""Ranks, nodes and devices."""

from __future__ import annotations

from typing import Any

import pytest

from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.placement import Placement, place, visible_devices


def group(gpus: int, per_engine: int, per_node: int) -> InferenceConfig:
    values = {
        "inference_num_gpus": gpus,
        "inference_num_gpus_per_engine": per_engine,
        "inference_num_gpus_per_node": per_node,
        "vllm": {"tp_size": per_engine},
    }
    return InferenceConfig.model_validate(values)


@pytest.mark.parametrize(
    ("settings", "ranks_per_node", "expected"),
    [
        (group(1, 1, 1), 1, [(0, 0, 1, (0,))]),
        (group(2, 1, 2), 2, [(0, 0, 1, (0,)), (1, 0, 1, (1,))]),
        (
            group(8, 2, 4),
            2,
            [(0, 0, 1, (0, 1)), (1, 0, 1, (2, 3)), (2, 0, 1, (0, 1)), (3, 0, 1, (2, 3))],
        ),
        (group(6, 2, 4), 2, [(0, 0, 1, (0, 1)), (1, 0, 1, (2, 3)), (2, 0, 1, (0, 1))]),
        (group(16, 8, 8), 1, [(0, 0, 1, tuple(range(8))), (1, 0, 1, tuple(range(8)))]),
        (group(2, 2, 1), 1, [(0, 0, 2, (0,)), (0, 1, 2, (0,))]),
        (
            group(32, 16, 8),
            1,
            [(e, node, 2, tuple(range(8))) for e in range(2) for node in range(2)],
        ),
    ],
)
def test_place(
    settings: InferenceConfig, ranks_per_node: int, expected: list[tuple[Any, ...]]
) -> None:
    """By table: engine, node of the engine, nodes of the engine, device slots."""
    assert settings.ranks_per_node == ranks_per_node
    assert settings.num_ranks == len(expected)
    for rank, place_of_rank in enumerate(expected):
        assert place(settings, rank, len(expected)) == Placement(*place_of_rank)


def test_one_rank_for_each_engine() -> None:
    with pytest.raises(ConfigError, match="2 ranks for 4 engines of 1 nodes"):
        place(group(4, 1, 4), 0, 2)
    with pytest.raises(ConfigError, match="2 ranks for 2 engines of 2 nodes"):
        place(group(4, 2, 1), 0, 2)


@pytest.mark.parametrize(
    ("devices", "current", "expected"),
    [
        ((0,), None, "0"),
        ((2, 3), None, "2,3"),
        ((2, 3), "0,1,2,3", "2,3"),
        ((1,), "GPU-aa,GPU-bb", "GPU-bb"),
        ((0, 1), "4,5", "4,5"),
        # Slurm bound the task to its own GPU already
        ((1,), "3", "3"),
        ((2, 3), "6,7", "6,7"),
    ],
)
def test_visible_devices(devices: tuple[int, ...], current: str | None, expected: str) -> None:
    assert visible_devices(devices, current) == expected


@pytest.mark.parametrize("current", ["", "0,1,2"])
def test_too_few_devices(current: str) -> None:
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES is"):
        visible_devices((4, 5), current)
