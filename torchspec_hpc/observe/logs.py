"""Log files by role, node and rank, and the one message a failing process leaves.

``TORCHSPEC_LOG_LEVEL`` sets how much is said; :class:`~torchspec_hpc.config.rundir.RunDir`
knows where.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

from torchspec_hpc.config.endpoints import node_name
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import (
    TorchspecError,
    UserError,
    exit_code_of,
)

LEVEL_VARIABLE = "TORCHSPEC_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
#: Roles with one log per rank; any other role has one file per attempt.
RANKED_ROLES = ("training", "inference")

logger = logging.getLogger(__name__)


class AsciiFormatter(logging.Formatter):
    """One line a message, plain ASCII, with the place it came from."""

    def __init__(self, place: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {place} %(name)s: %(message)s")
        self.converter = time.localtime

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record; other characters become backslash escapes."""
        return super().format(record).encode("ascii", "backslashreplace").decode("ascii")


def log_level() -> str:
    """The level that ``TORCHSPEC_LOG_LEVEL`` asks for, ``INFO`` when it is not set.

    Raises:
        UserError: It names no level.
    """
    level = os.environ.get(LEVEL_VARIABLE, "INFO")
    if level.upper() not in LEVELS:
        raise UserError(f"{LEVEL_VARIABLE} is {level!r}", allowed=", ".join(LEVELS))
    return level.upper()


def setup_logging(role: str, rank: int, run: RunDir, attempt: int) -> Path:
    """Sends this process's log to its own file and to stderr.

    Args:
        role: ``training`` or ``inference``, with a file per rank, or another
            name (``supervisor``), with a file per attempt.
        rank: Global rank in the group.
        run: The run.
        attempt: Counts from 0.

    Returns:
        The log file.

    Raises:
        UserError: ``TORCHSPEC_LOG_LEVEL`` names no level, or the file cannot be written.
    """
    level = log_level()
    node = node_name()
    if role in RANKED_ROLES:
        path = run.rank_log(attempt, role, node, rank)
    else:
        path = run.attempt_logs(attempt) / f"{role}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _point_latest(run, attempt)
        handlers: list[logging.Handler] = [
            logging.FileHandler(path, encoding="ascii"),
            logging.StreamHandler(sys.stderr),
        ]
    except OSError as error:
        raise UserError(
            f"cannot write the log file {path}: {error.strerror}",
            hint="set TORCHSPEC_LOG_DIR to a directory that every node can write",
        ) from error
    formatter = AsciiFormatter(f"{node} {role}/{rank}")
    for handler in handlers:
        handler.setFormatter(formatter)
    # other libraries speak up from WARNING on; this package at the level asked for
    logging.basicConfig(level=logging.WARNING, handlers=handlers, force=True)
    for ours in ("torchspec_hpc", "__main__"):  # the latter: a module that `python -m` runs
        logging.getLogger(ours).setLevel(level)
    logging.captureWarnings(True)
    return path


def _point_latest(run: RunDir, attempt: int) -> None:
    """Moves the link ``latest`` to this attempt in one step: readers always find one."""
    link = run.latest_logs
    target = run.attempt_logs(attempt).name
    if link.is_symlink() and str(link.readlink()) == target:
        return
    temporary = run.logs / f".latest.{node_name()}.{os.getpid()}"
    temporary.symlink_to(target)
    temporary.replace(link)


def report_error(run: RunDir, role: str, rank: int, error: BaseException) -> int:
    """Leaves one clear message in the log and in ``control/errors``.

    Errors that this package raises on purpose are told by their message alone;
    anything else keeps its traceback in the log.

    Returns:
        The exit code of the process.
    """
    exit_code = exit_code_of(error)
    expected = isinstance(error, TorchspecError)
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    logger.error("%s", message, exc_info=None if expected else error)
    content = {
        "role": role,
        "rank": rank,
        "node": node_name(),
        "error": message,
        "exit_code": exit_code,
    }
    try:
        run.errors.mkdir(parents=True, exist_ok=True)
        write_atomic(run.errors / f"{role}_{rank}.json", content)
    except OSError as unwritable:  # the message is in the log; a full disk must not hide it
        logger.error("cannot write %s: %s", run.errors, unwritable)
    return exit_code
