"""``run.json``: which jobs a run has, also where the file was lost or never written."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, replace

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.scheduler import find_jobs, job_info

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """``run.json``: what the run is and as which job it runs.

    Attributes:
        run_id: As in the job's comment and in the endpoints.
        cluster: ``slurm`` or ``local``.
        job_id: Of the latest Slurm job; None for a local run.
    """

    run_id: str
    cluster: str
    job_id: str | None = None

    @classmethod
    def read(cls, run: RunDir) -> RunRecord | None:
        """None where the directory holds no run."""
        if not run.run_json.is_file():
            return None
        return cls(**json.loads(run.run_json.read_text(encoding="utf-8")))

    def write(self, run: RunDir) -> None:
        """Replaces ``run.json``, whole or not at all."""
        write_atomic(run.run_json, asdict(self))


def require_run(run: RunDir) -> RunRecord:
    """The record of a run that must be there.

    Raises:
        UserError: It is not.
    """
    record = RunRecord.read(run)
    if record is None:
        raise UserError(
            f"{run.root} is no run directory: it has no run.json",
            hint="give the directory that submit or run has printed",
        )
    return record


def open_jobs(run: RunDir) -> list[str]:
    """Jobs of this run that wait or run.

    They are found by the run id in their comment, too: that repairs a submission that was
    interrupted between ``sbatch`` and ``run.json``.

    Raises:
        UserError: There is no Slurm here.
        SchedulerError: The controller does not answer.
    """
    record = RunRecord.read(run)
    # the id that its job was given: the path may be spelled otherwise now
    jobs = set(find_jobs(comment=record.run_id if record else run.run_id))
    if record is None or record.cluster != "slurm":
        return sorted(jobs)
    known = record.job_id
    if known is not None and known not in jobs and not job_info(known).ended:
        jobs.add(known)
    if jobs and known not in jobs:
        newest = max(jobs, key=int)
        logger.warning("%s: its job is %s, which run.json did not know", run.root, newest)
        replace(record, job_id=newest).write(run)
    return sorted(jobs)
