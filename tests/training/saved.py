"""Checkpoints of the tiny draft on one rank, and what is in one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from tests.training import tiny
from torchspec_hpc.config import RunDir
from torchspec_hpc.training.checkpoint import Checkpointer
from torchspec_hpc.training.optim import build_optimizer
from torchspec_hpc.training.parallel import World, shard

ONE_RANK = World(0, 1, torch.device("cpu"))


def checkpointer(
    run: RunDir, draft: torch.nn.Module, /, is_async: bool = True, **meta: object
) -> Checkpointer:
    """Shards the draft, too; `meta` changes what the run says of itself."""
    config = tiny.training_config(learning_rate=1e-2, max_checkpoints=2, async_checkpoint=is_async)
    shard(draft, ONE_RANK, config)
    optimizer = build_optimizer(draft, config)
    return Checkpointer(run, ONE_RANK, draft, optimizer, replace(tiny.meta(1), **meta), config)


def content(folder: Path) -> dict[str, Any]:
    """Every value of a checkpoint by its name."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.full(item.size, 77, dtype=item.properties.dtype)
        if isinstance(item, TensorStorageMetadata)
        else None
        for name, item in stored.items()
    }
    load(state, storage_reader=FileSystemReader(folder), no_dist=True)
    return state


def assert_same_content(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the last bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(found[name], value), name
