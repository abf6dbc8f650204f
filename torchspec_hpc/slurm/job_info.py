"""What ``squeue`` and ``sacct`` say of a job, and how they print it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Our name for the state of a job that Slurm has forgotten: it ended a while ago.
GONE = "GONE"
#: States in which a job is over.
ENDED = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
        "PREEMPTED", "REVOKED", "TIMEOUT", GONE,
    }
)  # fmt: skip
#: Of these, the ones that neither a person nor a limit brought about.
_FAILED = frozenset({"BOOT_FAIL", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})

#: Fields that are asked for.
SQUEUE_FIELDS = (
    "JobID", "State", "exit_code", "RestartCnt", "Reason", "NodeList", "Partition", "PriorityLong",
    "StartTime", "TimeLeft", "HetJobOffset",
)  # fmt: skip
SACCT_FIELDS = ("JobID", "State", "ExitCode", "NodeList")


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
        start: When it started, or is expected to, as Slurm writes times; empty: not known.
        time_left: Until the time limit, as Slurm writes it.
        position: Place among the waiting jobs of its partition, from 1; None: not asked for.
    """

    job_id: str
    state: str
    exit_code: int | None = None
    restarts: int | None = None
    reason: str = ""
    nodes: str = ""
    start: str = ""
    time_left: str = ""
    position: int | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to this job any more."""
        return self.state in ENDED

    @property
    def failed(self) -> bool:
        """Whether its batch script failed or its node did, with nobody's intent."""
        return self.state in _FAILED


def parse_squeue(
    output: str, job_ids: Sequence[str], *, whole_queue: bool = False
) -> dict[str, JobInfo]:
    """Reads what ``squeue -O`` prints, one job or component a line.

    Args:
        output: Fields of :data:`SQUEUE_FIELDS`, each followed by a bar.
        job_ids: Jobs to tell about.
        whole_queue: The output is about all jobs, so that places in the queue are known.
    """
    rows = [dict(zip(SQUEUE_FIELDS, line.split("|"), strict=False)) for line in output.splitlines()]
    by_id = {row["JobID"]: row for row in rows}
    waiting: dict[str, list[int]] = {}
    for row in rows:
        if whole_queue and row["State"] == "PENDING" and row["HetJobOffset"] in ("0", "N/A"):
            waiting.setdefault(row["Partition"], []).append(int(row["PriorityLong"]))
    return {job_id: _job_info(by_id[job_id], waiting) for job_id in job_ids if job_id in by_id}


def _job_info(row: Mapping[str, str], waiting: Mapping[str, list[int]]) -> JobInfo:
    position = None
    if waiting and row["State"] == "PENDING":
        ahead = [p for p in waiting[row["Partition"]] if p > int(row["PriorityLong"])]
        position = len(ahead) + 1
    return JobInfo(
        row["JobID"],
        row["State"],
        exit_code=_exit_code(row["exit_code"]) if row["State"] in ENDED else None,
        restarts=int(row["RestartCnt"]),
        reason=row["Reason"],
        nodes=row["NodeList"],
        start=row["StartTime"].removeprefix("N/A"),
        time_left=row["TimeLeft"],
        position=position,
    )


def parse_sacct(output: str) -> dict[str, JobInfo]:
    """Reads ``JobID|State|ExitCode|NodeList`` lines; component 0 (``J+0``) speaks for het job J."""
    infos = {}
    for line in output.splitlines():
        name, state, status, nodes = line.split("|")[: len(SACCT_FIELDS)]
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
