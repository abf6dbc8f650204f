"""Heterogeneous jobs through submitit, which has none of its own (checked with 1.5).

A het job is one batch script whose last line is the command to run, so that is what this
executor takes: ``executor.submit(submitit.helpers.CommandFunction([...]))``.  Nothing is
pickled and submitit does not run inside the job, for good reasons: it would install its own
handler for the warning before the time limit, and it takes one result from one step where a
het job has several.  What stays is its interface: ``job.state``, ``job.done()``, ``job.wait()``,
``job.result()`` (the exit code, 0, or an error that shows the log), ``job.cancel()``.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import CommandFunction, DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.slurm.render import WARNING_SIGNAL, render_script
from torchspec_hpc.slurm.scheduler import (
    ENDED,
    GONE,
    SchedulerError,
    job_infos,
    sbatch_command,
)

logger = logging.getLogger(__name__)

_TAIL_LINES = 20


class HetSlurmWatcher(SlurmInfoWatcher):
    """Asks for all jobs of this process at once, and knows when a het job is over.

    submitit asks ``sacct``, which many clusters do not run, for job ``12`` and is told about
    ``12+0``: it would wait for ever.
    """

    def update(self) -> None:
        """One query for all jobs that are not known to be over."""
        open_jobs = sorted(self._registered - self._finished)
        if not open_jobs:
            return
        self._num_calls += 1
        self._last_status_check = time.time()
        try:
            infos = job_infos(open_jobs)
        except SchedulerError as error:  # the controller restarts now and then: ask again later
            logger.warning("%s", error)
            return
        for job_id, info in infos.items():
            self._info_dict[job_id] = {
                "JobID": job_id,
                "State": info.state,
                "NodeList": info.nodes,
                "ExitCode": "" if info.exit_code is None else str(info.exit_code),
            }
        self._finished |= {job_id for job_id, info in infos.items() if info.ended}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job is over: a requeued, suspended or held one is not."""
        return self.get_state(job_id, mode=mode) in ENDED


class HetJobPaths(JobPaths):
    """Files of a job of `run`; the folder is that of its first attempt."""

    @property
    def run(self) -> RunDir:
        """The run directory."""
        return RunDir(self.folder.parents[1])

    @property
    def submission_file(self) -> Path:
        """The rendered batch script."""
        return self.folder / "job.sbatch"

    @property
    def stdout(self) -> Path:
        """What the batch script printed, its stderr included."""
        return self.run.batch_log(str(self.job_id))

    @property
    def stderr(self) -> Path:
        """The same file: sbatch writes both into one."""
        return self.stdout


class HetSlurmJob(SlurmJob[int]):
    """A submitted het job; its result is the exit code of the command."""

    watcher = HetSlurmWatcher(delay_s=40)

    @property
    def paths(self) -> HetJobPaths:
        """Files of this job."""
        return HetJobPaths(self._paths.folder, job_id=self.job_id)

    def _get_outcome_and_result(self) -> tuple[str, int | str]:
        info = self.watcher.get_info(self.job_id, mode="force")
        state = info["State"]
        if state == "COMPLETED" or (state == GONE and self.paths.run.done.exists()):
            return "success", 0
        lines = [f"job {self.job_id} ended as {state}, exit code {info['ExitCode']}"]
        if log := self.stdout():
            lines += log.splitlines()[-_TAIL_LINES:]
        return "error", "\n".join(lines)

    def _interrupt(self, timeout: bool = False) -> None:
        """Sends what Slurm sends before the time limit, or (`timeout` false) at preemption."""
        signal = WARNING_SIGNAL if timeout else "TERM"
        subprocess.check_call(["scancel", "--batch", f"--signal={signal}", self.job_id])


class HetSlurmExecutor(SlurmExecutor):
    """Submits one command as the batch script of a heterogeneous job.

    Args:
        config: Sizes and Slurm options of both components.
        run: The run directory.
        attempt: Number of the job's first attempt; the script is kept in its folder.
    """

    job_class = HetSlurmJob

    def __init__(self, config: Config, run: RunDir, attempt: int = 0) -> None:
        super().__init__(folder=run.attempt_dir(attempt))
        self._config, self._run = config, run

    def _internal_process_submissions(
        self, delayed_submissions: list[DelayedSubmission]
    ) -> list[Job[Any]]:
        if len(delayed_submissions) > 1:
            raise ValueError("Slurm has no arrays of heterogeneous jobs: submit one run at a time")
        (delayed,) = delayed_submissions
        function = delayed.function
        if not isinstance(function, CommandFunction) or delayed.args or delayed.kwargs:
            raise TypeError(f"a het job runs a CommandFunction without arguments, not {function!r}")
        self.folder.mkdir(parents=True, exist_ok=True)
        return [self._submit_command(shlex.join(function.command))]

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return render_script(self._config, self._run, shlex.split(command))

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return sbatch_command(str(submission_file_path))

    def _num_tasks(self) -> int:
        return 1  # the batch script; tasks of its steps are the supervisor's business
