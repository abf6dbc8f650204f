"""Saves and loads everything that is needed to go on exactly, over all ranks."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from torchspec_hpc.config.checkpoint_files import BestCheckpoint, publish, recall_best
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta, Progress
from torchspec_hpc.config.rundir import KEPT_IDS, RunDir
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.training.main_rank import ask_main
from torchspec_hpc.training.parallel import World, seed_rank
from torchspec_hpc.training.random_state import random_state, set_random_state
from torchspec_hpc.training.staging import Stager

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
        meta: What the run is; its progress is filled in.
        config: How many to keep, and whether training goes on while one is written.

    Attributes:
        best_accept_len: Of the best checkpoint so far; -inf before the first.
    """

    def __init__(
        self,
        run: RunDir,
        world: World,
        draft: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: CheckpointMeta,
        config: TrainingConfig,
    ) -> None:
        self._run, self._world, self._config = run, world, config
        self._draft, self._optimizer, self._meta = draft, optimizer, meta
        self._current: Path | None = None  # what the state in memory was saved as
        self.best_accept_len = float("-inf")
        # of its own: what the writing thread sends must not mix with what training sends
        self._group = dist.new_group(
            backend="gloo", timeout=timedelta(minutes=config.distributed_timeout_minutes)
        )
        self._stager = Stager(pinned=world.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: Future[Path] | None = None

    def is_best(self, progress: Progress) -> bool:
        """Whether the draft is better than at any step before."""
        return progress.accept_len is not None and progress.accept_len > self.best_accept_len

    def save(self, progress: Progress) -> float:
        """Writes a checkpoint and makes it the latest, and the best if it is.

        With ``training.async_checkpoint`` it returns as soon as the state is copied; the
        checkpoint counts once :meth:`wait` has returned.

        Args:
            progress: How far the run is.

        Returns:
            Seconds that training was held up.

        Raises:
            CheckpointError: It, or the one before, could not be written; ``latest`` still names
                the last one that could.
        """
        start = time.monotonic()
        self.wait()
        folder = self._run.checkpoints / f"step_{progress.step}"
        if folder == self._current:
            return time.monotonic() - start  # stopped before the first step of this attempt
        temporary = folder.with_name(folder.name + ".tmp")
        if self._world.is_main:
            # others begin to write once they have the main rank's plan of who writes what
            shutil.rmtree(temporary, ignore_errors=True)
        state = self._state() | self._rng_state()
        finish = partial(self._finish, start, temporary, folder, progress, self._note(progress))
        if self._config.async_checkpoint:
            written = async_save(
                state,
                checkpoint_id=temporary,
                process_group=self._group,
                async_stager=self._stager,
            )
            assert isinstance(written, Future)
            self._in_flight = self._thread.submit(finish, written.result)
        else:
            self._current = finish(
                partial(save, state, checkpoint_id=temporary, process_group=self._group)
            )
        return time.monotonic() - start

    def amend(self, progress: Progress) -> None:
        """Adds to the latest checkpoint what the evaluation of its step has given.

        Raises:
            CheckpointError: It could not be written.
        """
        folder, accept_len = self._current, self._note(progress)
        assert folder is not None

        def write() -> None:
            replace(self._meta, **asdict(progress)).write(folder)
            if accept_len is not None:
                BestCheckpoint(folder.name, accept_len).write(self._run)

        self._on_main(folder, write)

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: It could not be written.
        """
        if self._in_flight is not None:
            in_flight, self._in_flight = self._in_flight, None
            self._current = in_flight.result()

    def check(self) -> None:
        """Raises if the checkpoint that was being written has failed; never waits.

        Raises:
            CheckpointError: It has.
        """
        if self._in_flight is not None and self._in_flight.done():
            self.wait()

    def load(self, folder: Path) -> Progress:
        """Loads model, optimizer, random state and progress.

        Another number of ranks than the one that saved is fine. What evaluations of another
        run have found does not count for this one.

        Raises:
            UserError: The checkpoint belongs to another draft, target or stream of samples.
            CheckpointError: It cannot be read.
        """
        meta = ask_main(self._world, partial(CheckpointMeta.read, folder))
        meta.check_continues(self._meta, folder)
        state = self._state()
        _load(state, folder)
        set_state_dict(
            self._draft,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self._load_rng(meta, folder)
        logger.info("resumed from %s, written by %d ranks", folder, meta.world_size)
        if folder.parent != self._run.checkpoints:
            return replace(meta.progress, accept_len=None, unreported=None)
        self._current = folder
        recall = partial(recall_best, self._run, folder, meta)
        self.best_accept_len = ask_main(self._world, recall)
        return meta.progress

    def load_weights(self, folder: Path) -> None:
        """Loads the model alone, to train on with other data.

        Raises:
            UserError: The checkpoint belongs to another draft.
            CheckpointError: It cannot be read.
        """
        CheckpointMeta.read(folder).check_weights(self._meta, folder)
        state: dict[str, Any] = {"model": get_model_state_dict(self._draft)}
        _load(state, folder)
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

    def _finish(
        self,
        start: float,
        temporary: Path,
        folder: Path,
        progress: Progress,
        best_len: float | None,
        write: Callable[[], object],
    ) -> Path:
        """Has the files written and the checkpoint counted; in a thread if training goes on."""
        try:
            write()  # returns, or raises, on every rank once all files are there
        except CheckpointException as error:  # derives from BaseException, not from Exception
            raise _not_saved(folder, _causes(error)) from error

        def name_it() -> None:
            if self._meta.draft["kept_ids_file"]:
                shutil.copyfile(self._run.kept_ids, temporary / KEPT_IDS)
            replace(self._meta, **asdict(progress)).write(temporary)
            publish(self._run, temporary, folder, self._config.max_checkpoints, best_len)

        self._on_main(folder, name_it)
        logger.info("checkpoint %s after %.1f s", folder.name, time.monotonic() - start)
        return folder

    def _note(self, progress: Progress) -> float | None:
        """Its acceptance length if that makes it the best, from now on."""
        if not self.is_best(progress):
            return None
        assert progress.accept_len is not None
        self.best_accept_len = progress.accept_len
        return progress.accept_len

    def _on_main(self, folder: Path, write: Callable[[], None]) -> None:
        """Has the main rank write; no rank leaves before what it wrote counts, or has failed."""
        failure: list[OSError | UserError | None] = [None]
        if self._world.is_main:
            try:
                write()
            except (OSError, UserError) as error:
                failure = [error]
        dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise _not_saved(folder, str(failure[0])) from failure[0]

    def _load_rng(self, meta: CheckpointMeta, folder: Path) -> None:
        """Goes on with this rank's random state, or with a new one if ranks are others now."""
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        mine = self._rng_state()
        names = {f"rng.{rank}.{kind}" for rank, kinds in mine["rng"].items() for kind in kinds}
        if meta.world_size != self._world.size or not names <= stored.keys():
            seed_rank(self._config.seed, meta.step, self._world.rank)
            return
        _load(mine, folder)
        set_random_state(mine["rng"][str(self._world.rank)])

    def _rng_state(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """This rank's part of the state; every rank has a name of its own for it."""
        return {"rng": {str(self._world.rank): random_state(self._world.device)}}


def _load(state: dict[str, Any], folder: Path) -> None:
    """Fills `state` from a checkpoint."""
    try:
        load(state, checkpoint_id=folder)
    except CheckpointException as error:  # derives from BaseException, not from Exception
        raise CheckpointError(
            f"cannot load the checkpoint {folder}: {_causes(error)}\n"
            f"  next:    write the name of an older step_<n> into {folder.with_name('latest')}"
        ) from error


def _not_saved(folder: Path, causes: str) -> CheckpointError:
    return CheckpointError(
        f"cannot save the checkpoint {folder}: {causes}\n"
        f"  next:    see that its disk has room and can be written, and start the run again: it "
        "goes on from the last one that could be saved"
    )


def _causes(error: CheckpointException) -> str:
    return "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in error.failures.items())
