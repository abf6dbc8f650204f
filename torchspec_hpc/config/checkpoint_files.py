"""What a checkpoint is on disk, and which one counts.

Layout of ``<run>/checkpoints``::

    step_<n>/  *.distcp .metadata   DCP: {"model", "optimizer", "rng"}, float32 masters and
                                    moments, random state of each rank
               kept_ids.npy         target ids of the draft vocabulary, where it is pruned
               meta.json            :class:`~torchspec_hpc.config.checkpoint_meta.CheckpointMeta`
    latest                          name of the newest complete folder
    best                            :class:`BestCheckpoint`, where held-out samples are evaluated

A folder is written as ``step_<n>.tmp``, renamed when every rank is done, and
only then named by ``latest`` and ``best``.  Whatever moment a process is killed
at, both name a complete checkpoint; if that is before ``best`` was moved, the next
attempt moves it: see :func:`recall_best`.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspec_hpc.config.checkpoint_meta import META, CheckpointMeta
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestCheckpoint:
    """The checkpoint with the longest acceptance length, as ``checkpoints/best`` holds it.

    Attributes:
        checkpoint: Name of its folder.
        accept_len: ``eval/accept_len`` of its step.
    """

    checkpoint: str
    accept_len: float

    @classmethod
    def read(cls, run: RunDir) -> BestCheckpoint | None:
        """Reads it, None before the first.

        Raises:
            UserError: The file is damaged, or names a checkpoint that is not there.
        """
        try:
            content = json.loads(run.best_checkpoint.read_text(encoding="utf-8"))
            best = cls(str(content["checkpoint"]), float(content["accept_len"]))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"cannot read {run.best_checkpoint}: {error!r}",
                allowed='{"checkpoint": "step_<n>", "accept_len": <number>}',
                hint="correct it, or remove it to begin the search for the best anew",
            ) from error
        _named(run.best_checkpoint, best.checkpoint)
        _step_of(best.checkpoint, run.best_checkpoint)
        return best

    def write(self, run: RunDir) -> None:
        """Makes it the best of the run."""
        write_atomic(run.best_checkpoint, asdict(self))

    @property
    def step(self) -> int:
        """Optimizer step of the checkpoint."""
        return int(self.checkpoint.removeprefix("step_"))


def latest_checkpoint(run: RunDir) -> Path | None:
    """The newest complete checkpoint of a run, or None before the first.

    Raises:
        UserError: ``latest`` names a folder that is not there.
    """
    name = _latest_name(run)
    if name is None:
        return None
    return _named(run.latest_checkpoint, name)


def latest_step(run: RunDir) -> int:
    """Optimizer step of the newest checkpoint; 0 before the first.

    Raises:
        UserError: ``latest`` names no checkpoint.
    """
    name = _latest_name(run)
    if name is None:
        return 0
    return _step_of(name, run.latest_checkpoint)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a run, its ``checkpoints``, one of them, ``latest`` or ``best``.

    Raises:
        UserError: There is none.
    """
    path = path.absolute()
    if (path / META).is_file():
        return path
    run = RunDir(path.parent.parent)
    if path == run.best_checkpoint and (best := BestCheckpoint.read(run)) is not None:
        return run.checkpoints / best.checkpoint
    if path == run.latest_checkpoint:
        path = run.checkpoints
    run = RunDir(path.parent)
    latest = latest_checkpoint(run if path == run.checkpoints else RunDir(path))
    if latest is None:
        raise UserError(
            f"{path} holds no checkpoint",
            allowed="a run directory, its checkpoints directory, one checkpoint in it, "
            "or the file latest or best beside them",
            hint="a run writes its first checkpoint after training.save_interval steps",
        )
    return latest


def publish(
    run: RunDir, temporary: Path, folder: Path, keep: int, accept_len: float | None = None
) -> None:
    """Gives a complete checkpoint its name, makes it the latest, removes old ones.

    Args:
        run: The run.
        temporary: The folder as it was written.
        folder: Its name from now on.
        keep: Number of newest checkpoints that stay; the latest and the best always do.
        accept_len: Makes it the best, too.
    """
    best = BestCheckpoint.read(run)
    if folder.is_dir():  # of an attempt that died before moving `latest`, or before going back
        if best is not None and best.checkpoint == folder.name:
            run.best_checkpoint.unlink()
            best = None
        _remove(folder)
    temporary.rename(folder)
    write_atomic(run.latest_checkpoint, folder.name + "\n")
    if accept_len is not None:
        best = BestCheckpoint(folder.name, accept_len)
        best.write(run)
    stay = {folder.name, best.checkpoint if best else folder.name}
    numbers = {path: path.name.removeprefix("step_") for path in run.checkpoints.glob("step_*")}
    complete = sorted((int(number), path) for path, number in numbers.items() if number.isdigit())
    old = [path for _, path in complete[:-keep] if path.name not in stay]
    # and what a save that was killed has left
    for path in [*old, *run.checkpoints.glob("step_*.tmp")]:
        _remove(path)


def recall_best(run: RunDir, latest: Path, meta: CheckpointMeta) -> float:
    """The best acceptance length up to the latest checkpoint, -inf if nothing was evaluated.

    Mends ``best`` where an attempt was killed between moving ``latest`` and ``best``.

    Args:
        run: The run.
        latest: Its checkpoint to go on from.
        meta: What is in that.

    Raises:
        UserError: ``best`` is damaged.
    """
    best = BestCheckpoint.read(run)
    if best is not None and best.step > meta.step:  # `latest` was set back by hand
        logger.warning("%s is of a later step than %d and does not count", best, meta.step)
        best = None
    accept_len = float("-inf") if best is None else best.accept_len
    if meta.accept_len is None or meta.accept_len <= accept_len:
        return accept_len
    logger.warning("%s is the best checkpoint, which was not written down", latest)
    BestCheckpoint(latest.name, meta.accept_len).write(run)
    return meta.accept_len


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:  # somebody reads it over NFS, say; the new checkpoint is safe
        logger.warning("cannot remove %s: %s", path, error)


def _named(file: Path, name: str) -> Path:
    """The checkpoint that a file beside it names."""
    folder = file.with_name(name)
    if not folder.is_dir():
        raise UserError(
            f"{file} names {name}, which is not there",
            hint="write the name of a complete step_<n> folder into it, or remove it",
        )
    return folder


def _step_of(name: str, file: Path) -> int:
    """The number in the name of a checkpoint."""
    number = name.removeprefix("step_")
    if not number.isdecimal():
        raise UserError(f"{file} holds {name!r}", allowed="step_<n>")
    return int(number)


def _latest_name(run: RunDir) -> str | None:
    try:
        return run.latest_checkpoint.read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # before the first
        return None
