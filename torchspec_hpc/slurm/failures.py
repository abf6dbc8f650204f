"""What failing workers say of themselves in ``control/errors``, and the one cause among it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import EXIT_USER_ERROR

logger = logging.getLogger(__name__)

#: Ranks of engines that join a run begin here: no run has so many of its own.
FIRST_JOINED_RANK = 1000


@dataclass(frozen=True)
class Failure:
    """The last words of one worker.

    Attributes:
        role: ``training`` or ``inference``.
        rank: Global rank in its group.
        node: Where it ran.
        error: One clear message.
        exit_code: Of its process.
    """

    role: str
    rank: int
    node: str
    error: str
    exit_code: int

    def __str__(self) -> str:
        return f"{self.role} rank {self.rank} on {self.node}: {self.error}"


def read_failures(run: RunDir) -> list[Failure]:
    """All failures of this attempt, in the order in which they were written."""
    refresh(run.errors)
    found: list[tuple[float, Failure]] = []
    for path in run.errors.glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            fields = json.loads(path.read_text(encoding="utf-8"))
            found.append((path.stat().st_mtime, Failure(**fields)))
    return [failure for _, failure in sorted(found, key=lambda item: item[0])]


def refresh(folder: Path) -> None:
    """NFS clients cache a directory's entries for a minute unless they change it themselves."""
    probe = folder / ".refresh"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:  # a full disk: then failures are seen later
        _warn_once(f"cannot write to the run directory: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def of_the_run(failures: Sequence[Failure]) -> list[Failure]:
    """Without those of engines that joined it: they are helpers, and end nothing."""
    return [failure for failure in failures if failure.rank < FIRST_JOINED_RANK]


def root_cause(failures: Sequence[Failure]) -> Failure | None:
    """The failure that explains the others.

    A mistake of the user's comes first: its worker ends at once, and the others fail for
    want of it.  Otherwise the first to fail takes the others with it.
    """
    by_user = [failure for failure in failures if failure.exit_code == EXIT_USER_ERROR]
    return next(iter(by_user or failures), None)


def clear_failures(run: RunDir) -> None:
    """Removes what an earlier attempt left."""
    for path in run.errors.glob("*.json"):
        path.unlink()
