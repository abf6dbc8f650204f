"""What Slurm knows about jobs, through its command line clients."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.slurm.job_info import (
    GONE,
    SACCT_FIELDS,
    SQUEUE_FIELDS,
    JobInfo,
    parse_sacct,
    parse_squeue,
)

logger = logging.getLogger(__name__)

_CLIENT_S = 60.0
#: Seconds before each further try of what must not fail because the controller restarts.
BACK_OFF_S = (2.0, 6.0, 16.0, 36.0)
_ESTIMATE = re.compile(r"to start at (\S+) using")


_T = TypeVar("_T")


class SchedulerError(TorchspecError):
    """Slurm did not answer."""


class NoSlurmClient(UserError):
    """One of Slurm's programs is not installed here."""


def job_infos(job_ids: Iterable[str], *, whole_queue: bool = False) -> dict[str, JobInfo]:
    """State of several jobs at once: one ``squeue``, and ``sacct`` for what it does not know.

    The order matters: accounting is often off, lags behind, and calls a het job ``J+0``;
    the controller forgets a job minutes after its end.

    Args:
        job_ids: As sbatch gave them.
        whole_queue: Look at everybody's jobs, to tell the place of these among them.

    Raises:
        SchedulerError: The controller does not answer.
    """
    wanted = list(job_ids)
    found = _squeue(wanted, whole_queue=whole_queue) if wanted else {}
    if unknown := [job_id for job_id in wanted if job_id not in found]:
        found |= _sacct(unknown)
    return {job_id: found.get(job_id, JobInfo(job_id, GONE)) for job_id in wanted}


def job_info(job_id: str) -> JobInfo:
    """State of one job; see :func:`job_infos`."""
    return job_infos([job_id])[job_id]


def find_jobs(comment: str) -> list[str]:
    """Own jobs in the queue, or running, that carry this comment.

    Raises:
        UserError: There is no Slurm here.
        SchedulerError: The controller does not answer.
    """
    done = run_client(["squeue", "--me", "--noheader", "-O", "HetJobID:|,JobID:|,Comment:|"])
    if done.returncode:
        raise SchedulerError(f"squeue failed: {done.stderr.strip()}")
    jobs = set()
    for line in done.stdout.splitlines():
        leader, job_id, found = line.split("|", 2)
        if found.removesuffix("|") == comment:
            jobs.add(leader if leader.isdecimal() and leader != "0" else job_id)
    return sorted(jobs)


def sbatch_command(*arguments: str) -> list[str]:
    """``sbatch`` as if from a fresh login; see :func:`clean_environment`."""
    return clean_environment("sbatch", *arguments)


def clean_environment(*command: str, **variables: str) -> list[str]:
    """A command of Slurm's as if from a fresh login.

    Variables that an enclosing job or a profile set (``SLURM_NTASKS``, ``SBATCH_PARTITION``, ...)
    are options to it, and would be inherited by the job. ``SLURM_CONF`` stays.

    Args:
        command: The command.
        variables: To set for it.
    """
    stale = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]
    stale = sorted(set(stale) - {"SLURM_CONF"})
    if options := [name for name in stale if name.startswith("SBATCH_")]:
        logger.warning("%s have no effect on this job: use the configuration", ", ".join(options))
    unset = [f"--unset={name}" for name in stale]
    return ["env", *unset, *(f"{name}={value}" for name, value in variables.items()), *command]


def check_submission(script: str) -> str | None:
    """Asks Slurm whether it would accept a batch script, without submitting it.

    Returns:
        The earliest start, as Slurm writes times, if it can say. It looks at each component
        as if there were no other.

    Raises:
        UserError: There is no Slurm here, or it refuses the script.
    """
    done = run_client(sbatch_command("--test-only"), stdin=script)
    if done.returncode:
        raise refused(done.stderr)
    match = _ESTIMATE.search(done.stderr)
    return match[1] if match else None


def count_nodes(partitions: Iterable[str | None]) -> int | None:
    """Number of different nodes in these partitions taken together; None: the default one.

    Returns:
        None where one of them is hidden.

    Raises:
        UserError: There is no Slurm here.
        SchedulerError: The controller does not answer.
    """
    done = run_client(["sinfo", "--noheader", "--Node", "--format=%P|%N"])
    if done.returncode:
        raise SchedulerError(f"sinfo failed: {done.stderr.strip()}")
    nodes: dict[str | None, set[str]] = {}
    for line in done.stdout.splitlines():
        partition, node = line.split("|")
        nodes.setdefault(partition.rstrip("*"), set()).add(node)
        if partition.endswith("*"):
            nodes.setdefault(None, set()).add(node)
    names = [name for p in partitions for name in (p.split(",") if p else [None])]
    if not set(names) <= set(nodes):
        return None
    return len(set().union(*(nodes[name] for name in names)))


def refused(stderr: str) -> UserError:
    """The error for a job that sbatch did not take."""
    return UserError(
        f"Slurm refuses the job: {stderr.strip()}",
        hint="compare the slurm section of the configuration with sinfo and sacctmgr show assoc",
    )


def run_client(argv: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's client programs, whatever its exit code.

    Raises:
        NoSlurmClient: It is not installed.
        SchedulerError: It did not end.
    """
    try:
        return subprocess.run(
            argv, input=stdin, text=True, capture_output=True, timeout=_CLIENT_S, check=False
        )
    except FileNotFoundError as error:
        raise NoSlurmClient(
            f"there is no {error.filename} on this machine", hint="run this on a login node"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise SchedulerError(f"{argv[0]} did not answer within {_CLIENT_S:.0f} s") from error


def insist(ask: Callable[[], _T], back_off_s: Sequence[float] = BACK_OFF_S) -> _T:
    """Asks Slurm until it answers.

    Args:
        ask: Raises :class:`SchedulerError` where another try may help.
        back_off_s: Seconds before each further try.

    Raises:
        SchedulerError: Of the last try.
    """
    for delay_s in back_off_s:
        try:
            return ask()
        except SchedulerError as error:  # noqa: PERF203 - it sleeps anyway
            logger.warning("%s; asking again in %.0f s", error, delay_s)
            time.sleep(delay_s)
    return ask()


def _squeue(job_ids: Sequence[str], *, whole_queue: bool) -> dict[str, JobInfo]:
    fields = ",".join(f"{name}:|" for name in SQUEUE_FIELDS)
    which = ["--all"] if whole_queue else [f"--jobs={','.join(job_ids)}"]
    done = run_client(["squeue", "--noheader", "--states=all", *which, "-O", fields])
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SchedulerError(f"squeue failed: {done.stderr.strip()}")
    return parse_squeue(done.stdout, job_ids, whole_queue=whole_queue)


def _sacct(job_ids: Sequence[str]) -> dict[str, JobInfo]:
    try:
        done = run_client(
            ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(job_ids)}",
             f"--format={','.join(SACCT_FIELDS)}"]
        )  # fmt: skip
    except NoSlurmClient:
        return {}
    if done.returncode:  # "Slurm accounting storage is disabled" is the usual reason
        logger.debug("sacct failed: %s", done.stderr.strip())
    return parse_sacct(done.stdout)
