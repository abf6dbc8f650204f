"""The log files of a run, by role, node and rank, and reading them while they grow."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import UserError

#: Roles with one file an attempt, and the name of that.
SINGLE_ROLES = {
    "supervisor": "supervisor.log",
    "mooncake": "mooncake_master.log",
    "control": "control_store.log",
    "inference_step": "inference_step.log",
    "training_step": "training_step.log",
}
RANKED_ROLES = ("training", "inference")
#: What the batch script printed, in all attempts of a job.
BATCH = "batch"
ROLES = (*SINGLE_ROLES, *RANKED_ROLES, BATCH)

_RANK = re.compile(r"_rank(\d+)_")
_POLL_S = 1.0
_BLOCK_BYTES = 65536


@dataclass(frozen=True)
class LogQuery:
    """Which logs.

    Attributes:
        roles: Of :data:`ROLES`.
        node: Host name; None: all.
        rank: Global rank in its group; None: all.
        attempt: From 0; None: the newest.
    """

    roles: tuple[str, ...] = ("supervisor",)
    node: str | None = None
    rank: int | None = None
    attempt: int | None = None


def find_logs(run: RunDir, query: LogQuery) -> list[Path]:
    """Log files of a run, in order of role, node and rank.

    Raises:
        UserError: There are none, with what there is.
    """
    # resolved: a file's path must not come to mean that of the next attempt
    folder = run.latest_logs.resolve() if query.attempt is None else run.attempt_logs(query.attempt)
    found: list[Path] = []
    for role in query.roles:
        if role == BATCH:
            found += sorted(run.job.glob("slurm-*.out"), key=lambda p: p.stat().st_mtime)[-1:]
        elif role in SINGLE_ROLES:
            found += folder.glob(SINGLE_ROLES[role])
        else:
            files = (folder / role).glob(f"{query.node or '*'}/*.log")
            found += sorted(path for path in files if query.rank in (None, _rank_of(path)))
    if not found:
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.log"))
        raise UserError(
            f"{folder} has no such log",
            allowed=", ".join(there) or "nothing yet: the run has not started",
            hint="torchspec-hpc status RUN says whether it waits",
        )
    return found


def last_lines(path: Path, num_lines: int) -> tuple[str, int]:
    """The end of a file, and the position where that was."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        start, text = end, b""
        while start > 0 and text.count(b"\n") <= num_lines:
            start = max(0, start - _BLOCK_BYTES)
            file.seek(start)
            text = file.read(end - start)
    lines = text.decode("utf-8", "replace").splitlines(keepends=True)
    return "".join(lines[-num_lines:] if num_lines else []), end


def follow(
    find: Callable[[], list[Path]], positions: dict[Path, int], ended: Callable[[], bool]
) -> Iterator[tuple[Path, str]]:
    """What is appended to the files, until the run has ended and everything was read.

    Args:
        find: The files; asked again and again, as an attempt may follow with files of its own.
        positions: Where reading begins, for each file; new files are read from their beginning
            and added.
        ended: Whether the run has ended; asked once a second.
    """
    while True:
        over = ended()
        with contextlib.suppress(UserError):  # an attempt that has just begun has no such log yet
            positions |= {path: positions.get(path, 0) for path in find()}
        for path in positions:  # those of the attempt before too: to their last line
            text, positions[path] = _read_from(path, positions[path])
            if text:
                yield path, text
        if over:
            return
        time.sleep(_POLL_S)


def _read_from(path: Path, position: int) -> tuple[str, int]:
    """Whole lines from there on, and where the next ones begin."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return data.decode("utf-8", "replace"), position + len(data)


def _rank_of(path: Path) -> int | None:
    match = _RANK.search(path.name)
    return int(match[1]) if match else None
