"""What a checkpoint is on disk, and which one counts.

Layout of ``<run>/checkpoints``::

    step_<n>/  *.distcp .metadata   DCP: {"model", "optimizer", "rng"}, float32 masters and
                                    moments, random state of each rank
               kept_ids.npy         target ids of the draft vocabulary, where it is pruned
               meta.json            :class:`CheckpointMeta`
    latest                          name of the newest complete folder
    best                            :class:`BestCheckpoint`, where held-out samples are evaluated

A folder is written as ``step_<n>.tmp``, renamed when every rank is done, and
only then named by ``latest`` and ``best``.  Whatever moment a process is killed
at, both name a complete checkpoint.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError

logger = logging.getLogger(__name__)

_META = "meta.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        cursor: Packs of the stream consumed, over all ranks and epochs.
        skipped: Steps among them that left the parameters as they were.
    """

    step: int = 0
    cursor: int = 0
    skipped: int = 0


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

    @property
    def step(self) -> int:
        """Optimizer step of the checkpoint."""
        return int(self.checkpoint.removeprefix("step_"))


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint belongs to, as ``meta.json`` holds it.

    Attributes:
        step: Optimizer steps done.
        cursor: Packs of the stream consumed.
        draft: ``{"algorithm", "config", "kept_ids_file"}``.
        target: Path or hub id of the target model.
        stream: What fixes the order of packs: dataset key, its size, seed, shuffling, packing.
        world_size: Trainer ranks that wrote it.
        skipped: Steps that left the parameters as they were.
        versions: Versions of this package and of torch.
        format_version: Of this layout.
    """

    step: int
    cursor: int
    draft: dict[str, Any]
    target: str
    stream: dict[str, Any]
    world_size: int
    skipped: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = 2

    @classmethod
    def read(cls, folder: Path) -> CheckpointMeta:
        """Reads ``meta.json`` of a checkpoint.

        Raises:
            UserError: The folder is no complete checkpoint, or of another version.
        """
        try:
            content = json.loads((folder / _META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder} is not a complete checkpoint: {error}",
                allowed="a folder <run>/checkpoints/step_<n> with its meta.json",
            ) from error
        names = {item.name for item in fields(cls)}
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != cls.format_version or set(content) != names:
            raise UserError(
                f"{folder} was written in another format ({version})",
                allowed=f"format_version {cls.format_version}",
                hint="read it with the version of torchspec_hpc that wrote it",
            )
        return cls(**content)

    def write(self, folder: Path) -> None:
        """Writes ``meta.json``."""
        write_atomic(folder / _META, asdict(self))

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(self.step, self.cursor, self.skipped)

    def check_matches(self, ours: CheckpointMeta, names: tuple[str, ...], folder: Path) -> None:
        """Refuses a checkpoint of another run.

        Args:
            ours: The run that wants to load it.
            names: Fields that must agree.
            folder: Where it lies, for the message.

        Raises:
            UserError: A field differs.
        """
        here = json.loads(json.dumps(asdict(ours)))  # as the file would hold it: no tuples
        for name in names:
            if getattr(self, name) != here[name]:
                raise UserError(
                    f"{folder} belongs to another {name}: "
                    f"{_difference(getattr(self, name), here[name])}",
                    hint="use the configuration it was written with, or take only its weights "
                    "(training.continual_training: true) into a new run",
                )


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
    if (path / _META).is_file():
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
        write_atomic(run.best_checkpoint, asdict(best))
    stay = {folder.name, best.checkpoint if best else folder.name}
    numbers = {path: path.name.removeprefix("step_") for path in run.checkpoints.glob("step_*")}
    complete = sorted((int(number), path) for path, number in numbers.items() if number.isdigit())
    old = [path for _, path in complete[:-keep] if path.name not in stay]
    # and what a save that was killed has left
    for path in [*old, *run.checkpoints.glob("step_*.tmp")]:
        _remove(path)


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


def _difference(found: Any, ours: Any, name: str = "") -> str:
    """Names what differs, not two whole dictionaries."""
    if isinstance(found, dict) and isinstance(ours, dict):
        keys = [key for key in {**found, **ours} if found.get(key) != ours.get(key)]
        return ", ".join(
            _difference(found.get(key), ours.get(key), f"{name}{key} ") for key in keys
        )
    return f"{name}{found!r} there, {ours!r} here"
