"""What a checkpoint says of itself: how far its run is, and what it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.errors import UserError

#: Name of the file in the checkpoint's folder, which is complete if it is there.
META = "meta.json"
#: Of ``draft``: not of the weights, but of what the optimizer holds.
_TRAINED = "freeze_lm_head"


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: Optimizer steps done.
        cursor: Packs of the stream consumed, over all ranks and epochs.
        skipped: Steps among them that left the parameters as they were.
        accept_len: ``eval/accept_len`` of this step; None: it was not evaluated.
        unreported: Numbers of this step by tag if a stop kept it from being evaluated: they are
            reported together with those of its evaluation, which the next attempt makes.
    """

    step: int = 0
    cursor: int = 0
    skipped: int = 0
    accept_len: float | None = None
    unreported: dict[str, float] | None = None


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint belongs to, as ``meta.json`` holds it.

    Attributes:
        step: Optimizer steps done.
        cursor: Packs of the stream consumed.
        draft: ``{"algorithm", "config", "kept_ids_file", "freeze_lm_head"}``.
        target: Path or hub id of the target model.
        stream: What fixes the order of packs: dataset key, its size, seed, shuffling, packing.
        world_size: Trainer ranks that wrote it.
        skipped: As in :class:`Progress`, like the next two.
        accept_len: Of this step.
        unreported: Of this step.
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
    accept_len: float | None = None
    unreported: dict[str, float] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = 3

    @classmethod
    def read(cls, folder: Path) -> CheckpointMeta:
        """Reads ``meta.json`` of a checkpoint.

        Raises:
            UserError: The folder is no complete checkpoint, or of another version.
        """
        try:
            content = json.loads((folder / META).read_text(encoding="utf-8"))
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
        write_atomic(folder / META, asdict(self))

    @property
    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(**{item.name: getattr(self, item.name) for item in fields(Progress)})

    def check_continues(self, ours: CheckpointMeta, folder: Path) -> None:
        """Refuses to go on from a checkpoint of another run.

        Args:
            ours: The run that wants to load it.
            folder: Where it lies, for the message.

        Raises:
            UserError: Draft, target or stream of samples differ.
        """
        _check(self, ours, ("draft", "target", "stream"), folder)

    def check_weights(self, ours: CheckpointMeta, folder: Path) -> None:
        """Refuses to take the weights of another draft; arguments as above.

        Raises:
            UserError: The draft differs in more than in what of it is trained.
        """
        found, ours = (
            replace(meta, draft={k: v for k, v in meta.draft.items() if k != _TRAINED})
            for meta in (self, ours)
        )
        _check(found, ours, ("draft",), folder)


def _check(
    found: CheckpointMeta, ours: CheckpointMeta, names: tuple[str, ...], folder: Path
) -> None:
    """Refuses a checkpoint if one of these fields differs."""
    here = json.loads(json.dumps(asdict(ours)))  # as the file would hold it: no tuples
    for name in names:
        if getattr(found, name) != here[name]:
            raise UserError(
                f"{folder} belongs to another {name}: "
                f"{_difference(getattr(found, name), here[name])}",
                hint="use the configuration it was written with, or take only its weights "
                "(training.continual_training: true) into a new run",
            )


def _difference(found: Any, ours: Any, name: str = "") -> str:
    """Names what differs, not two whole dictionaries."""
    if isinstance(found, dict) and isinstance(ours, dict):
        keys = [key for key in {**found, **ours} if found.get(key) != ours.get(key)]
        return ", ".join(
            _difference(found.get(key), ours.get(key), f"{name}{key} ") for key in keys
        )
    return f"{name}{found!r} there, {ours!r} here"
