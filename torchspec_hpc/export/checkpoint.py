"""Reads a draft's weights from a sharded checkpoint, without a GPU or a process group."""

from __future__ import annotations

import warnings
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
        tensors: float32 master weights by parameter name.
        kept_ids: Target ids of the draft's rows, ascending, int64 [V_draft]; None: all of them.
    """

    path: Path
    meta: CheckpointMeta
    tensors: dict[str, torch.Tensor]
    kept_ids: np.ndarray[Any, np.dtype[np.int64]] | None


def read_checkpoint(path: Path) -> DraftCheckpoint:
    """Reads the draft's weights, whatever number of trainers wrote them.

    Raises:
        UserError: The directory holds no checkpoint of a draft, or one of another version.
    """
    folder = find_checkpoint(path)
    meta = CheckpointMeta.read(folder)
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    model = {
        key.removeprefix(_PREFIX): torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in stored.items()
        if key.startswith(_PREFIX) and isinstance(item, TensorStorageMetadata)
    }
    if not model:
        raise UserError(f"{folder} holds no model weights", allowed="a checkpoint of this project")
    state = {"model": model}
    with warnings.catch_warnings():
        # torch warns that there is no process group although we say so
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        except CheckpointException as error:  # derives from BaseException, not from Exception
            causes = "; ".join(str(cause[0]) for cause in error.failures.values())
            raise UserError(
                f"{folder} cannot be read: {causes}", hint="export an older step_<n> of the run"
            ) from error
    kept_file = meta.draft["kept_ids_file"]
    kept = np.load(folder / kept_file) if kept_file else None
    return DraftCheckpoint(folder, meta, state["model"], kept)


def untrained(checkpoint: DraftCheckpoint, model: ModelConfig, seed: int) -> DraftCheckpoint:
    """The same draft before its first step, to measure what training was worth.

    Args:
        checkpoint: Any checkpoint of the run.
        model: The run's target.
        seed: The run's ``training.seed``.
    """
    config = Eagle3Config.from_dict(checkpoint.meta.draft["config"])
    spec = TargetSpec.from_path(model.target_model_path)
    target = load_target_tensors(model, spec, torch.float32)
    kept = None if checkpoint.kept_ids is None else torch.from_numpy(checkpoint.kept_ids)
    draft = Eagle3Draft(config, target.embedding, kept)
    draft.initialize(target, seed)
    tensors = {name: parameter.detach() for name, parameter in draft.named_parameters()}
    return replace(checkpoint, meta=replace(checkpoint.meta, step=0), tensors=tensors)
