"""Jobs of two groups through submitit, which has none of its own (checked with 1.5).

A job is one batch script whose last line is what to run: a command (``executor.submit(
submitit.helpers.CommandFunction([...]))``, what ``submit`` uses) or a function, which submitit
pickles and calls on the script's node.  It takes one result from one process, where a job has
many: whatever starts there starts the steps.  The rest is submitit's interface: ``job.state``,
``job.done()``, ``job.wait()``, ``job.result()``, ``job.cancel()``, ``job.stdout()``.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import CommandFunction, DelayedSubmission, JobPaths
from submitit.slurm.slurm import SlurmExecutor, SlurmInfoWatcher, SlurmJob

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.slurm.job_info import ENDED, GONE
from torchspec_hpc.slurm.render import WARNING_SIGNAL, render_script
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.scheduler import SchedulerError, job_infos, sbatch_command
from torchspec_hpc.slurm.snapshot import snapshot_code

logger = logging.getLogger(__name__)

#: What we override or call of submitit beyond its documentation; a test compares it with the
#: installed version.
PRIVATE_API = {
    SlurmInfoWatcher: ("update", "is_done", "get_state", "get_info"),
    SlurmJob: ("_get_outcome_and_result", "_interrupt"),
    SlurmExecutor: (
        "_internal_process_submissions", "_make_submission_file_text",
        "_make_submission_command", "_num_tasks", "_submit_command", "_submitit_command_str",
    ),
}  # fmt: skip

_TAIL_LINES = 20


class RunWatcher(SlurmInfoWatcher):
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


class RunJobPaths(JobPaths):
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


class RunJob(SlurmJob[Any]):
    """A submitted job; its result is the exit code of a command, or what a function returns."""

    watcher = RunWatcher(delay_s=40)

    def __init__(self, folder: Path | str, job_id: str, tasks: Sequence[int] = (0,)) -> None:
        # squeue and sacct call the leader of a het job J+0
        super().__init__(folder, job_id.partition("+")[0], tasks)

    @property
    def paths(self) -> RunJobPaths:
        """Files of this job."""
        return RunJobPaths(self._paths.folder, job_id=self.job_id)

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        if self.paths.result_pickle.exists():  # of a function
            return super()._get_outcome_and_result()
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


class RunExecutor(SlurmExecutor):
    """Submits one command as the batch script of a run's job.

    Args:
        config: Sizes and Slurm options of both groups.
        run: The run directory.
        attempt: Number of the job's first attempt; the script is kept in its folder.
        after: A job whose end this one waits for.
    """

    job_class = RunJob

    def __init__(
        self, config: Config, run: RunDir, attempt: int = 0, after: str | None = None
    ) -> None:
        super().__init__(folder=run.attempt_dir(attempt))
        self._config, self._run, self._after = config, run, after

    def _internal_process_submissions(
        self, delayed_submissions: list[DelayedSubmission]
    ) -> list[Job[Any]]:
        if len(delayed_submissions) > 1:
            raise ValueError("Slurm has no arrays of heterogeneous jobs: submit one run at a time")
        if not self._run.code.exists():
            self._run.create()
            snapshot_code(self._run)
        self.folder.mkdir(parents=True, exist_ok=True)
        function = delayed_submissions[0].function
        if isinstance(function, CommandFunction):
            return [self._submit_command(shlex.join(function.command))]
        return super()._internal_process_submissions(delayed_submissions)

    @property
    def _submitit_command_str(self) -> str:
        """Runs a pickled function; its warning is ours, not submitit's usual USR2."""
        python = Runtime(self._config, self._run).node_python
        known = ["SUBMITIT_EXECUTOR=slurm", f"SUBMITIT_PREEMPT_SIGNAL={WARNING_SIGNAL}"]
        return shlex.join(
            ["env", *known, python, "-u", "-m", "submitit.core._submit", str(self.folder)]
        )

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return render_script(self._config, self._run, shlex.split(command))

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        after = [f"--dependency=afterany:{self._after}"] if self._after else []
        return sbatch_command(*after, str(submission_file_path))

    def _num_tasks(self) -> int:
        return 1  # the batch script; tasks of its steps are the supervisor's business
