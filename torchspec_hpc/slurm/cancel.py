"""Ends a run for good: politely, with a checkpoint, and by force where that takes too long."""

from __future__ import annotations

import getpass
import logging
import os
import signal
import socket
import time
from collections.abc import Callable

from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.lock import Holder
from torchspec_hpc.slurm.record import open_jobs, require_run
from torchspec_hpc.slurm.scheduler import SchedulerError, insist, job_infos, run_client
from torchspec_hpc.slurm.watch import stop_grace_s, write_stop

logger = logging.getLogger(__name__)

_POLL_S = 1.0
#: Between questions to the scheduler.
_ASK_EVERY_S = 30.0
#: After the trainers' time is over: to stop the engines and to end the job.
_END_S = 60.0


def cancel(
    run: RunDir,
    *,
    now: bool = False,
    wait: bool = True,
    tell: Callable[[str], None] = logger.info,
) -> str:
    """Cancels a run.

    A job that waits is taken out of the queue.  One that runs is asked for a checkpoint, through
    the run's directory, and has ``control.stop_grace_s`` for it; then ``scancel`` ends it.

    Args:
        run: The run.
        now: Do not ask for a checkpoint.
        wait: Wait for the end; otherwise nobody is there to end it by force.
        tell: Is told what happens.

    Returns:
        How it ended: ``nothing to cancel``, ``cancelled``, ``asked to stop``, ``stopped``, or
        ``killed``.

    Raises:
        UserError: There is no such run, it runs on another machine, or there is no Slurm here.
        SchedulerError: The controller does not answer.
    """
    record = require_run(run)
    if record.cluster == "local":
        return _cancel_local(run, now=now, wait=wait)
    jobs = open_jobs(run)
    if not jobs:
        return "nothing to cancel"
    write_atomic(run.cancelled, {"by": getpass.getuser(), "time": time.time()})
    waiting = [info.job_id for info in job_infos(jobs).values() if info.state == "PENDING"]
    if now or waiting == jobs:
        _scancel(jobs)
        return "cancelled"
    if waiting:
        _scancel(waiting)
    grace_s = _ask_politely(run)
    if not wait:
        return "asked to stop"
    tell(f"job {', '.join(jobs)}: asked for a checkpoint, for {grace_s:.0f} s at most")
    if _ends_in_time(run, jobs, grace_s + _END_S):
        return "stopped"
    insist(lambda: _scancel(jobs))
    return "killed"


def _ask_politely(run: RunDir) -> float:
    """Asks the trainers to stop, and says how many seconds they may take."""
    write_stop(run, "the run is cancelled")
    return stop_grace_s(load_config(run.config))


def _ends_in_time(run: RunDir, jobs: list[str], seconds: float) -> bool:
    """Watches the run's files often and the scheduler rarely."""
    deadline, asked = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < deadline:
        time.sleep(_POLL_S)
        if run.exit_codes.exists() and not run.lock.exists():
            return True
        if time.monotonic() - asked > _ASK_EVERY_S:
            asked = time.monotonic()
            if _have_ended(jobs):
                return True
    return False


def _have_ended(jobs: list[str]) -> bool:
    """Whether Slurm says so: where it does not answer, the end by force is still to come."""
    try:
        return all(info.ended for info in job_infos(jobs).values())
    except SchedulerError as error:
        logger.warning("%s", error)
        return False


def _cancel_local(run: RunDir, *, now: bool, wait: bool) -> str:
    holder = Holder.read(run)
    if holder is None:
        return "nothing to cancel"
    if holder.host != socket.gethostname():
        raise UserError(f"it is {holder}", hint=f"cancel it on {holder.host}")
    if holder.is_gone():
        return "nothing to cancel"
    if not now:
        grace_s = _ask_politely(run)
        if not wait:
            return "asked to stop"
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            if not run.lock.exists():
                return "stopped"
            time.sleep(_POLL_S / 4)
    for _ in range(2):  # as with Ctrl-C: the second one kills everything
        os.kill(holder.pid, signal.SIGINT)
        time.sleep(_POLL_S)
    return "killed"


def _scancel(jobs: list[str]) -> None:
    done = run_client(["scancel", *jobs])
    if done.returncode:
        raise SchedulerError(f"scancel failed: {done.stderr.strip()}")
