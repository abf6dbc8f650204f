"""The draft vocabulary of a run: chosen once, kept in the run directory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.rundir import KEPT_IDS
from torchspec_hpc.data.dataset import TokenDataset
from torchspec_hpc.data.vocab import draft_vocabulary
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.initial_draft import InitialDraft
from torchspec_hpc.training.parallel import World

Ids = NDArray[np.int64]


def load_kept_ids(
    config: Config,
    run: RunDir,
    world: World,
    dataset: TokenDataset,
    spec: TargetSpec,
    source: Path | None,
    initial: InitialDraft | None = None,
) -> Tensor | None:
    """The target ids that the draft's head can say; every rank calls it.

    The first attempt takes them from `source`, the checkpoint to go on from, or from `initial`, the
    published draft to begin with, whose heads have just these rows, or else counts the data; later
    attempts find them in the run directory.

    Returns:
        Ascending ids, int64 ``[draft_vocab_size]``; None if the draft has the target's vocabulary.

    Raises:
        ConfigError: The sizes of the vocabularies do not fit, or a checkpoint has another one.
    """
    size = config.model.draft_vocab_size
    if size is None or size == spec.vocab_size:
        return None
    path = run.kept_ids
    if world.is_main and not path.exists():
        if source is not None and (source / KEPT_IDS).is_file():
            kept = np.load(source / KEPT_IDS)
        elif initial is not None and initial.kept_ids is not None:
            kept = initial.kept_ids.numpy()
        else:
            specials = {spec.bos_token_id, *spec.eos_token_ids} - {None}
            kept = draft_vocabulary(dataset, spec.vocab_size, size, specials)  # type: ignore[arg-type]
        _save(path, kept)
    elif world.is_main and source is not None and (source / KEPT_IDS).is_file():
        _require_same(np.load(path), np.load(source / KEPT_IDS), path, source)
    dist.barrier()
    kept = np.load(path)
    if len(kept) != size:
        raise ConfigError(
            f"model.draft_vocab_size = {size}, but {path} keeps {len(kept)} tokens",
            hint="set it back, or start a new run: a draft's vocabulary cannot change",
        )
    return torch.from_numpy(kept)


def _require_same(kept: Ids, saved: Ids, path: Path, source: Path) -> None:
    """The rows of a checkpoint's head are those ids, whatever the run's file says by now."""
    if not np.array_equal(kept, saved):
        raise ConfigError(
            f"{path} keeps other tokens than the head of {source} has rows for",
            hint=f"copy {source / KEPT_IDS} there, or start a new run",
        )


def _save(path: Path, kept: Ids) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npy")
    np.save(temporary, kept)
    temporary.replace(path)
