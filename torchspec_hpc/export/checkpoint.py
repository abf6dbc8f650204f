"""Reads a draft's weights from a sharded checkpoint, without a GPU or a process group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from torchspec_hpc.config.checkpoint_files import find_checkpoint
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.errors import UserError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import load_target_tensors

_PREFIX = "model."


@dataclass(frozen=True)
class DraftCheckpoint:
    """A trained draft as it lies in a checkpoint.

    Attributes:
        path: The checkpoint's directory.
        meta: Its ``meta.json``.
        tensors: float32 master weights by parameter name; those of a checkpoint are read from
            the disk each time they are looked up.
        kept_ids: Target ids of the draft's rows, ascending, int64 [V_draft]; None: all of them.
    """

    path: Path
    meta: CheckpointMeta
    tensors: Mapping[str, torch.Tensor]
    kept_ids: np.ndarray[Any, np.dtype[np.int64]] | None


class _Stored(Mapping[str, torch.Tensor]):
    """The model's tensors in a sharded checkpoint, one read at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        self._items = {
            key.removeprefix(_PREFIX): item
            for key, item in stored.items()
            if key.startswith(_PREFIX) and isinstance(item, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, name: str) -> torch.Tensor:
        item = self._items[name]
        tensor = torch.empty(item.size, dtype=item.properties.dtype)
        with warnings.catch_warnings():
            # torch warns that there is no process group although we say so
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                reader = FileSystemReader(self._folder)
                load({_PREFIX + name: tensor}, storage_reader=reader, no_dist=True)
            except CheckpointException as error:  # derives from BaseException, not from Exception
                causes = "; ".join(str(cause[0]) for cause in error.failures.values())
                raise _unreadable(self._folder, causes) from error
            except OSError as error:
                raise _unreadable(self._folder, str(error)) from error
        return tensor


def _unreadable(folder: Path, causes: str) -> UserError:
    return UserError(
        f"{folder} cannot be read: {causes}",
        hint="export again if the run is training and has removed it meanwhile (it keeps the "
        "newest training.max_checkpoints), or export another step_<n>",
    )


def read_checkpoint(path: Path) -> DraftCheckpoint:
    """Opens a checkpoint, whatever number of trainers wrote it.

    Raises:
        UserError: The directory holds no checkpoint of a draft, or one of another version.
    """
    folder = find_checkpoint(path)
    meta = CheckpointMeta.read(folder)
    try:
        tensors = _Stored(folder)
        kept_file = meta.draft["kept_ids_file"]
        kept = np.load(folder / kept_file) if kept_file else None
    except OSError as error:
        raise _unreadable(folder, str(error)) from error
    if not tensors:
        raise UserError(f"{folder} holds no model weights", allowed="a checkpoint of this project")
    return DraftCheckpoint(folder, meta, tensors, kept)


def untrained(checkpoint: DraftCheckpoint, model: ModelConfig, seed: int) -> DraftCheckpoint:
    """The same draft before its first step, to measure what training was worth.

    Args:
        checkpoint: Any checkpoint of the run.
        model: The run's target.
        seed: The run's ``training.seed``.

    Raises:
        UserError: The run began with the weights of a published draft.
    """
    if model.initial_draft is not None:
        raise UserError(
            f"the run began with model.initial_draft = {model.initial_draft}",
            hint="that is the draft before the first step: evaluate it as it is",
        )
    config = Eagle3Config.from_dict(checkpoint.meta.draft["config"])
    spec = TargetSpec.from_path(model.target_model_path)
    target = load_target_tensors(model, spec, torch.float32)
    kept = None if checkpoint.kept_ids is None else torch.from_numpy(checkpoint.kept_ids)
    draft = Eagle3Draft(config, target.embedding, kept)
    draft.initialize(target, seed)
    tensors = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    return replace(checkpoint, meta=replace(checkpoint.meta, step=0), tensors=tensors)
