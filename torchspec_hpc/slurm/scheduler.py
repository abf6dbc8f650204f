"""What Slurm knows about jobs, through its command line clients."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torchspec_hpc.errors import TorchspecError, UserError

logger = logging.getLogger(__name__)

#: Our name for the state of a job that Slurm has forgotten: it ended a while ago.
GONE = "GONE"
#: States in which a job is over.
ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
        "PREEMPTED", "REVOKED", "TIMEOUT", GONE,
    }
)  # fmt: skip

_CLIENT_S = 60.0
#: Seconds before each further try of what must not fail because the controller restarts.
BACK_OFF_S = (2.0, 6.0, 16.0, 36.0)
_SQUEUE_FIELDS = ("JobID", "State", "exit_code", "RestartCnt", "Reason", "NodeList")
_SACCT_FIELDS = ("JobID", "State", "ExitCode", "NodeList")
_ESTIMATE = re.compile(r"to start at (\S+) using")


_T = TypeVar("_T")


class SchedulerError(TorchspecError):
    """Slurm did not answer."""


class NoSlurmClient(UserError):
    """One of Slurm's programs is not installed here."""


@dataclass(frozen=True)
class JobInfo:
    """State of one job; of a het job, that of its leader.

    Attributes:
        job_id: As sbatch gave it.
        state: As Slurm spells it (``PENDING``, ``RUNNING``, ...), or :data:`GONE`.
        exit_code: Of the batch script, once it ended.
        restarts: How often the job was requeued, where Slurm says so.
        reason: Why it waits, or why it ended.
        nodes: Host list expression; empty before the start.
    """

    job_id: str
    state: str
    exit_code: int | None = None
    restarts: int | None = None
    reason: str = ""
    nodes: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to this job any more."""
        return self.state in ENDED


def job_infos(job_ids: Iterable[str]) -> dict[str, JobInfo]:
    """State of several jobs at once: one ``squeue``, and ``sacct`` for what it does not know.

    The order matters: accounting is often off, lags behind, and calls a het job ``J+0``;
    the controller forgets a job minutes after its end.

    Raises:
        SchedulerError: The controller does not answer.
    """
    wanted = list(job_ids)
    found = _squeue(wanted)
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
    """``sbatch`` as if from a fresh login.

    Variables that an enclosing job or a profile set (``SLURM_NTASKS``, ``SBATCH_PARTITION``, ...)
    are options to sbatch, and would be inherited by the job. ``SLURM_CONF`` stays.
    """
    stale = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_"))]
    stale = sorted(set(stale) - {"SLURM_CONF"})
    if options := [name for name in stale if name.startswith("SBATCH_")]:
        logger.warning("%s have no effect on this job: use the configuration", ", ".join(options))
    return ["env", *(f"--unset={name}" for name in stale), "sbatch", *arguments]


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


def _squeue(job_ids: Sequence[str]) -> dict[str, JobInfo]:
    fields = ",".join(f"{name}:|" for name in _SQUEUE_FIELDS)
    done = run_client(
        ["squeue", "--noheader", "--states=all", f"--jobs={','.join(job_ids)}", "-O", fields]
    )
    if done.returncode and "Invalid job id" not in done.stderr:
        raise SchedulerError(f"squeue failed: {done.stderr.strip()}")
    infos = {}
    for line in done.stdout.splitlines():
        job_id, state, status, restarts, reason, nodes = line.split("|")[: len(_SQUEUE_FIELDS)]
        infos[job_id] = JobInfo(
            job_id,
            state,
            exit_code=_exit_code(status) if state in ENDED else None,
            restarts=int(restarts),
            reason=reason,
            nodes=nodes,
        )
    return infos


def _sacct(job_ids: Sequence[str]) -> dict[str, JobInfo]:
    try:
        done = run_client(
            ["sacct", "--allocations", "--noheader", "--parsable2", f"--jobs={','.join(job_ids)}",
             f"--format={','.join(_SACCT_FIELDS)}"]
        )  # fmt: skip
    except NoSlurmClient:
        return {}
    if done.returncode:  # "Slurm accounting storage is disabled" is the usual reason
        logger.debug("sacct failed: %s", done.stderr.strip())
    return parse_sacct(done.stdout)


def parse_sacct(output: str) -> dict[str, JobInfo]:
    """Reads ``JobID|State|ExitCode|NodeList`` lines; component 0 (``J+0``) speaks for het job J."""
    infos = {}
    for line in output.splitlines():
        name, state, status, nodes = line.split("|")[: len(_SACCT_FIELDS)]
        job_id, _, component = name.partition("+")
        if component not in ("", "0"):
            continue
        state = state.split()[0]  # CANCELLED by 1000
        code = _exit_code(status) if state in ENDED else None
        infos[job_id] = JobInfo(job_id, state, exit_code=code, nodes=nodes)
    return infos


def _exit_code(status: str) -> int:
    """As squeue prints it, which is what wait(2) returned, or sacct, ``code:signal``."""
    if ":" in status:
        code, signal = map(int, status.split(":"))
        return -signal if signal else code
    return os.waitstatus_to_exitcode(int(status))
