"""This Slurm job seen from inside: what becomes of it, and how its run goes on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from torchspec_hpc.slurm.job_info import JobInfo
from torchspec_hpc.slurm.scheduler import (
    BACK_OFF_S,
    NoSlurmClient,
    SchedulerError,
    insist,
    job_info,
    run_client,
    sbatch_command,
)

logger = logging.getLogger(__name__)

#: Seconds after which a requeued job may start again.  Slurm lets it wait for ``cred_expire``,
#: 120 by default, unless its start lies in the future already when its nodes are clean: then
#: it runs again after some 12 s (seen with Slurm 22.05 and 24.11).
_RESTART_DELAY_S = 10


class JobFate(Enum):
    """What becomes of a job."""

    RUNNING = "the job goes on"
    REQUEUED = "Slurm has put the job back into the queue"
    TIME_LIMIT = "the job has reached its time limit"
    CANCELLED = "the job was cancelled"
    UNKNOWN = "Slurm does not say what becomes of the job"


def read_fate(info: JobInfo, restart_count: int) -> JobFate:
    """Reads it from what the scheduler says while the job is being killed.

    It is COMPLETING then, whatever the cause.  But a requeue, also one after preemption or a
    node failure, has been counted, and a time limit is given as the reason; a cancelled job
    shows neither (seen with Slurm 22.05 and 24.11).

    Args:
        info: State of the leader.
        restart_count: Restarts before this attempt.
    """
    if info.restarts is None:  # the controller does not know this job any more
        return JobFate.UNKNOWN
    if info.restarts > restart_count:
        return JobFate.REQUEUED
    if info.state == "RUNNING":
        return JobFate.RUNNING
    if info.state == "TIMEOUT" or info.reason == "TimeLimit":
        return JobFate.TIME_LIMIT
    return JobFate.CANCELLED


class Job:
    """This job.

    Args:
        job_id: Of the het leader.
        restart_count: Restarts before this attempt.
        num_components: Of the het job.
        back_off_s: Seconds before each further try to reach Slurm.
    """

    def __init__(
        self,
        job_id: str,
        restart_count: int,
        num_components: int,
        back_off_s: Sequence[float] = BACK_OFF_S,
    ) -> None:
        self.job_id, self._back_off_s = job_id, back_off_s
        self._restart_count, self._num_components = restart_count, num_components

    def fate(self) -> JobFate:
        """What becomes of the job; UNKNOWN where Slurm does not answer."""
        try:
            return insist(self._ask_fate, self._back_off_s)
        except (SchedulerError, NoSlurmClient) as error:
            logger.error("%s", error)
            return JobFate.UNKNOWN

    def _ask_fate(self) -> JobFate:
        fate = read_fate(job_info(self.job_id), self._restart_count)
        if fate is JobFate.UNKNOWN:
            raise SchedulerError(fate.value)
        return fate

    def requeue(self) -> None:
        """Puts the job back into the queue; Slurm kills this attempt within ``KillWait``.

        Raises:
            SchedulerError: Slurm refuses, or does not answer.
            NoSlurmClient: This node has no ``scontrol``.
        """
        insist(self._ask_requeue, self._back_off_s)
        for component in range(self._num_components):
            name = int(self.job_id) + component
            done = run_client(
                ["scontrol", "update", f"JobId={name}", f"StartTime=now+{_RESTART_DELAY_S}"]
            )
            if done.returncode:  # then it waits longer
                logger.debug("cannot hasten the restart: %s", done.stderr.strip())

    def _ask_requeue(self) -> None:
        done = run_client(["scontrol", "requeue", self.job_id])
        if done.returncode:
            raise SchedulerError(f"Slurm does not requeue this job: {done.stderr.strip()}")

    def chain(self, script: Path) -> str:
        """Submits a job that starts when this one has ended, however that happens.

        Args:
            script: Its batch script.

        Returns:
            Its id.

        Raises:
            SchedulerError: Slurm refuses, or does not answer.
        """
        command = sbatch_command("--parsable", f"--dependency=afterany:{self.job_id}", str(script))

        def ask() -> str:
            done = run_client(command)
            if done.returncode:
                raise SchedulerError(f"Slurm takes no job from this node: {done.stderr.strip()}")
            return done.stdout.strip().split(";")[0]

        return insist(ask, self._back_off_s)
