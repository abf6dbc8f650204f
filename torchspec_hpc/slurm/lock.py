"""One run directory, one attempt at a time: ``control/lock`` names who writes to it."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.slurm.scheduler import job_info

logger = logging.getLogger(__name__)

_MAX_TRIES = 3


class RunLocked(UserError):
    """Somebody else writes to this run directory."""


@dataclass(frozen=True)
class Holder:
    """Who holds the lock.

    Attributes:
        job_id: Of its Slurm job; None: a local run.
        host: Where its supervisor runs.
        pid: Of its supervisor.
        since: Seconds since the epoch.
    """

    job_id: str | None
    host: str
    pid: int
    since: float

    @classmethod
    def this_process(cls, job_id: str | None) -> Holder:
        """The supervisor that calls this."""
        return cls(job_id, socket.gethostname(), os.getpid(), time.time())

    @classmethod
    def read(cls, run: RunDir) -> Holder | None:
        """None where nobody holds it."""
        try:
            return cls(**json.loads(run.lock.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def __str__(self) -> str:
        where = f"{self.host}, process {self.pid}"
        return f"job {self.job_id} on {where}" if self.job_id else f"a local run on {where}"

    def is_gone(self) -> bool:
        """Whether it has ended without removing its lock.

        Raises:
            RunLocked: That cannot be known from here.
        """
        if self.job_id is not None:
            try:
                return job_info(self.job_id).ended
            except TorchspecError as error:
                raise RunLocked(
                    f"the run is locked by {self}, and Slurm does not say whether that has ended: "
                    f"{error}"
                ) from error
        if self.host != socket.gethostname():
            raise RunLocked(f"the run is locked by {self}, which cannot be looked at from here")
        return not Path(f"/proc/{self.pid}").exists()


@contextmanager
def run_lock(run: RunDir, job_id: str | None) -> Iterator[None]:
    """Holds the lock of a run while the body runs.

    The same job takes its own lock over: it was requeued after a kill.  So does anybody whose
    predecessor has ended.

    Raises:
        RunLocked: Another attempt runs, or may run.
    """
    own = Holder.this_process(job_id)
    _acquire(run, own)
    try:
        yield
    finally:
        if Holder.read(run) == own:
            run.lock.unlink()


def check_not_locked(run: RunDir, own_job: str | None) -> Holder | None:
    """Refuses where somebody else writes to the run.

    Args:
        run: The run.
        own_job: The Slurm job that asks, whose own lock does not count.

    Returns:
        Whose stale lock is there, if any.

    Raises:
        RunLocked: Another attempt runs, or may run.
    """
    holder = Holder.read(run)
    if holder is None:
        return None
    try:
        mine = holder.job_id is not None and holder.job_id == own_job
        if not mine and not holder.is_gone():
            raise RunLocked(f"the run {run.root} is written to by {holder}")
    except RunLocked as error:
        raise RunLocked(
            error.what, hint=f"wait for its end; if you know that it has ended: rm {run.lock}"
        ) from error.__cause__
    return holder


def _acquire(run: RunDir, own: Holder) -> None:
    temporary = run.lock.with_name(f".lock.{own.host}.{own.pid}")
    for _ in range(_MAX_TRIES):
        write_atomic(temporary, asdict(own))
        try:
            os.link(temporary, run.lock)  # fails where it exists, over NFS too
        except FileExistsError:
            _release_stale(run, own)
        else:
            return
        finally:
            temporary.unlink()
    raise RunLocked(f"{run.lock} is taken again and again", hint="look for a second supervisor")


def _release_stale(run: RunDir, own: Holder) -> None:
    if (holder := check_not_locked(run, own.job_id)) is not None:
        logger.warning("the lock of %s is stale: it is taken over", holder)
        run.lock.unlink(missing_ok=True)
