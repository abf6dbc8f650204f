"""Saves and loads everything that is needed to go on exactly, over all ranks."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from torchspec_hpc.config.checkpoint_files import CheckpointMeta, Progress, publish
from torchspec_hpc.config.rundir import KEPT_IDS, RunDir
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.training.parallel import World, seed_rank

logger = logging.getLogger(__name__)


class CheckpointError(TorchspecError):
    """A checkpoint could not be written or read."""


class Checkpointer:
    """The checkpoints of one run.

    Every rank calls every method, in the same order.

    Args:
        run: The run.
        world: The training group.
        draft: The sharded draft.
        optimizer: Its optimizer.
        meta: What the run is; step and cursor are filled in.
        seed: Of the run, for the random state of ranks that have none saved.
        keep: Number of newest checkpoints to keep.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        draft: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: CheckpointMeta,
        *,
        seed: int,
        keep: int,
    ) -> None:
        self._run, self._world, self._seed, self._keep = run, world, seed, keep
        self._draft, self._optimizer, self._meta = draft, optimizer, meta
        self._current: Path | None = None  # what the state in memory was saved as

    def save(self, progress: Progress) -> Path:
        """Writes a checkpoint and makes it the latest.

        Raises:
            CheckpointError: It could not be written; the one before is still the latest.
        """
        start = time.monotonic()
        folder = self._run.checkpoints / f"step_{progress.step}"
        if folder == self._current:
            return folder  # stopped before the first step of this attempt
        temporary = folder.with_name(folder.name + ".tmp")
        if self._world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        self._write(temporary, progress)
        dist.barrier()  # the files of every rank are there
        if self._world.is_main:
            publish(self._run, temporary, folder, self._keep)
        dist.barrier()  # nobody leaves before the checkpoint counts
        self._current = folder
        logger.info("checkpoint %s in %.1f s", folder.name, time.monotonic() - start)
        return folder

    def load(self, folder: Path) -> Progress:
        """Loads model, optimizer, random state and progress.

        Another number of ranks than the one that saved is fine.

        Raises:
            UserError: The checkpoint belongs to another draft, target or stream of samples.
            CheckpointError: It cannot be read.
        """
        meta = CheckpointMeta.read(folder)
        meta.check_matches(self._meta, ("draft", "target", "stream"), folder)
        state = self._state()
        _dcp(load, state, folder)
        set_state_dict(
            self._draft,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        if meta.world_size == self._world.size:
            _set_rng_state(_load_rng_state(self._rng_file(folder)))
        else:  # ranks are other ranks now: new streams, reproducible all the same
            seed_rank(self._seed, meta.step, self._world.rank)
        self._current = folder
        logger.info("resumed from %s, written by %d ranks", folder, meta.world_size)
        return meta.progress

    def load_weights(self, folder: Path) -> None:
        """Loads the model alone, to train on with other data.

        Raises:
            UserError: The checkpoint belongs to another draft.
            CheckpointError: It cannot be read.
        """
        CheckpointMeta.read(folder).check_matches(self._meta, ("draft",), folder)
        state: dict[str, Any] = {"model": get_model_state_dict(self._draft)}
        _dcp(load, state, folder)
        set_model_state_dict(self._draft, state["model"])
        logger.info("weights taken from %s", folder)

    def _state(self) -> dict[str, Any]:
        fresh = not self._optimizer.state
        model, optimizer = get_state_dict(self._draft, self._optimizer)
        if fresh:
            # torch made the moments by a step with a learning rate of 0, and counted it
            for moments in self._optimizer.state.values():
                moments["step"].zero_()
        return {"model": model, "optimizer": optimizer}

    def _write(self, folder: Path, progress: Progress) -> None:
        _dcp(save, self._state(), folder)
        torch.save(_rng_state(), self._rng_file(folder))
        if self._world.is_main:
            if self._meta.draft["kept_ids_file"]:
                shutil.copyfile(self._run.kept_ids, folder / KEPT_IDS)
            replace(self._meta, **asdict(progress)).write(folder)

    def _rng_file(self, folder: Path) -> Path:
        return folder / f"rng_rank{self._world.rank}.pt"


def _dcp(function: Callable[..., Any], state: dict[str, Any], folder: Path) -> None:
    """Runs ``save`` or ``load`` of DCP with its errors as ours."""
    try:
        function(state, checkpoint_id=folder)
    except CheckpointException as error:  # derives from BaseException, not from Exception
        causes = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
        raise CheckpointError(
            f"cannot {function.__name__} the checkpoint {folder}: {causes}"
        ) from error


def _load_rng_state(file: Path) -> dict[str, Tensor]:
    try:
        state: dict[str, Tensor] = torch.load(file, weights_only=True)
    except (OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"cannot load {file}: {error}") from error
    return state


def _rng_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
