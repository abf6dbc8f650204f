"""From a configuration to one heterogeneous job in the queue."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from submitit.core.core import Job
from submitit.core.utils import CommandFunction, FailedJobError, FailedSubmissionError

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.attempts import History
from torchspec_hpc.slurm.executor import RunExecutor
from torchspec_hpc.slurm.inputs import check_inputs
from torchspec_hpc.slurm.prepare import (
    check_not_queued,
    check_run,
    prepare_run,
    run_directory,
)
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.render import render_script, supervisor_command
from torchspec_hpc.slurm.scheduler import check_submission, count_nodes, refused
from torchspec_hpc.slurm.shape import components

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubmittedRun:
    """A run in the queue.

    Attributes:
        run: Its directory.
        job: The submitit job.
        earliest_start: As Slurm writes times, if it can say.
    """

    run: RunDir
    job: Job[Any]
    earliest_start: str | None

    @property
    def job_id(self) -> str:
        """Id of the het job's leader, which stands for the whole job."""
        return self.job.job_id

    def as_json(self) -> dict[str, str | None]:
        """Plain data."""
        start = self.earliest_start
        return {"job_id": self.job_id, "run": str(self.run.root), "earliest_start": start}


def submit(config: Config, *, resume: bool = False, after: str | None = None) -> SubmittedRun:
    """Submits the run and returns at once.

    Slurm is asked first whether it would take the job, so that a refused one leaves no trace.

    Args:
        config: The resolved configuration.
        resume: Go on with a run that exists, from its latest checkpoint.
        after: A job whose end this one waits for, however that ends.

    Raises:
        ConfigError: ``cluster`` is not ``slurm``, or a setting cannot be written into a script.
        UserError: The run exists (or, with `resume`, does not, or is still in the queue), its
            directory cannot be written, or Slurm refuses the job.
    """
    if config.cluster != "slurm":
        raise ConfigError(f"cluster is {config.cluster!r}", hint="submit needs cluster=slurm")
    run = run_directory(config)
    check_run(run, resume=resume)
    check_inputs(config)
    check_not_queued(run)
    check_disjoint(config)
    earliest_start = check_submission(render_script(config, run))
    prepare_run(config, resume=resume)
    attempt = len(History(run).attempts)
    executor = RunExecutor(config, run, attempt=attempt, after=after)
    try:
        job = executor.submit(CommandFunction(supervisor_command(config, run)))
    except (FailedJobError, FailedSubmissionError) as error:
        raise refused(str(error)) from error
    RunRecord(run.run_id, config.cluster, job_id=job.job_id).write(run)
    logger.info("job %s submitted: %s", job.job_id, run.root)
    return SubmittedRun(run=run, job=job, earliest_start=earliest_start)


def check_disjoint(config: Config) -> None:
    """Components of a het job never share a node: with too few nodes it would wait for ever.

    Raises:
        ConfigError: The partitions have too few nodes.
        UserError: There is no Slurm here.
        SchedulerError: The controller does not answer.
    """
    parts = components(config)
    needed = sum(part.num_nodes for part in parts)
    partitions = [part.options.partition for part in parts]
    available = count_nodes(partitions)
    if available is not None and available < needed:
        names = ", ".join(sorted({name or "the default partition" for name in partitions}))
        raise ConfigError(
            f"the job needs {needed} nodes, no two components on the same; {names} has {available}",
            hint="ask for fewer nodes in inference or training, or for other partitions in slurm",
        )
