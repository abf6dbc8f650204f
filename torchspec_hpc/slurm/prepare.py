"""The run directory before anything runs in it.

``python -m torchspec_hpc.slurm.prepare CONFIG [--resume] [KEY=VALUE]...`` does it from within
a batch script (``sbatch/train_het.sbatch``) and prints the path.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torchspec_hpc.config.endpoints import create_secret
from torchspec_hpc.config.load import load_config, save_config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import SlurmConfig
from torchspec_hpc.errors import (
    EXIT_DONE,
    ConfigError,
    TorchspecError,
    UserError,
    exit_code_of,
)
from torchspec_hpc.observe.provenance import provenance
from torchspec_hpc.slurm.env import job_id, read_nodes
from torchspec_hpc.slurm.inputs import check_inputs
from torchspec_hpc.slurm.lock import check_not_locked
from torchspec_hpc.slurm.record import RunRecord, open_jobs
from torchspec_hpc.slurm.snapshot import snapshot_code

#: Keys of ``slurm`` that count in a script of one's own too; the others become its header.
_READ_IN_THE_JOB = {
    *("topology", "resume", "max_requeues", "network_interface", "runtime", "python"),
    *("cpus_per_task", "gpus", "gpu_type"),  # of a group: for the steps
}


def run_directory(config: Config) -> RunDir:
    """Where the run of this configuration lives."""
    assert config.run_name is not None  # load_config sets it
    return RunDir(Path(config.output_dir) / config.run_name)


def prepare_run(config: Config, *, resume: bool = False, job: str | None = None) -> RunDir:
    """Makes the run directory: configuration, provenance, shared secret, ``run.json``.

    Args:
        config: The resolved configuration. A resumed run takes this one from now on.
        resume: Go on with a run that exists.
        job: The Slurm job that runs this, if any. Its own run is always accepted: the job
            was requeued.

    Raises:
        UserError: The run exists and is not to be resumed, or the other way round, or is
            complete, or somebody writes to it; a file that the configuration names is missing or
            does not fit; or the directory cannot be written.
    """
    run = run_directory(config)
    record = RunRecord.read(run)
    if record is not None and job is not None and record.job_id == job:
        return run
    check_run(run, resume=resume)
    if resume:
        check_not_locked(run, job)
    check_inputs(config)
    run.create()
    # first of all, so that what is interrupted from here on can be resumed
    RunRecord(run.run_id, config.cluster).write(run)
    if config.cluster == "slurm":
        snapshot_code(run)
    for path in (run.cancelled, run.endpoints, run.exit_codes):  # of the start before this one
        path.unlink(missing_ok=True)
    save_config(config, run.config)
    create_secret(run)
    start = {**provenance(), "data": _data_files(config)}
    write_atomic(run.provenance, {"starts": [*_earlier_starts(run), start]})
    RunRecord(run.run_id, config.cluster, job_id=job).write(run)
    return run


def check_run(run: RunDir, *, resume: bool) -> None:
    """Refuses to overwrite a run, to resume what does not exist, and to resume what is done.

    Raises:
        UserError: One of these.
    """
    if not resume and run.root.is_dir() and any(run.root.iterdir()):
        raise UserError(
            f"the run directory {run.root} exists",
            hint="choose another run_name, or go on with it: --resume",
        )
    if resume and not run.run_json.exists():
        raise UserError(
            f"there is no run to resume in {run.root}", hint="check output_dir and run_name"
        )
    if resume and run.done.exists():
        raise UserError(
            f"the run {run.root} is complete", hint=f"to train it further, remove {run.done}"
        )


def check_not_queued(run: RunDir, *, own_job: str | None = None) -> None:
    """Refuses a second job for a run whose job waits or runs.

    Args:
        run: The run.
        own_job: A job that does not count.

    Raises:
        UserError: There is such a job.
    """
    if jobs := sorted(set(open_jobs(run)) - {own_job}):
        raise UserError(
            f"the run {run.root} waits or runs as job {', '.join(jobs)}",
            hint=f"wait for its end, or: scancel {' '.join(jobs)}",
        )


def header_settings(slurm: SlurmConfig) -> list[str]:
    """Keys that are set and that only a rendered header would carry out."""
    given = slurm.model_dump(exclude_defaults=True)
    groups = {name: given.pop(name, {}) for name in ("inference", "training")}
    keys = [f"slurm.{key}" for key in given if key not in _READ_IN_THE_JOB]
    return keys + [
        f"slurm.{name}.{key}"
        for name, group in groups.items()
        for key in group
        if key not in _READ_IN_THE_JOB
    ]


def _data_files(config: Config) -> dict[str, dict[str, float]]:
    """Size and time of the data files, by which a later look tells whether they are the same."""
    paths = (config.dataset.train_data_path, config.dataset.eval_data_path)
    files = [Path(path) for path in paths if path and Path(path).exists()]
    stats = {str(path): path.stat() for path in files}
    return {path: {"bytes": s.st_size, "modified": s.st_mtime} for path, s in stats.items()}


def _earlier_starts(run: RunDir) -> list[object]:
    if not run.provenance.exists():
        return []
    return list(json.loads(run.provenance.read_text(encoding="utf-8"))["starts"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares the run of the batch script that calls this, also when it was requeued."""
    parser = argparse.ArgumentParser(prog="python -m torchspec_hpc.slurm.prepare")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides")
    parser.add_argument("--resume", action="store_true", help="go on with a run that exists")
    options = parser.parse_args(arguments)
    try:
        job = job_id(os.environ)
        name = f"{os.environ.get('SLURM_JOB_NAME', 'run')}-{job}"
        overrides = [f"run_name={name}", *options.overrides, "cluster=slurm"]
        config = load_config(options.config, overrides)
        read_nodes(os.environ, config)
        if config.slurm.resume == "chain":
            raise ConfigError(
                "slurm.resume is chain, and this script was not rendered",
                allowed="requeue or none in a script of your own",
                hint="torchspec-hpc submit, or slurm.resume=none",
            )
        if ignored := header_settings(config.slurm):
            sys.stderr.write(
                f"warning: {', '.join(ignored)}: no effect here; set them in the script's header\n"
            )
        check_not_queued(run_directory(config), own_job=job)
        run = prepare_run(config, resume=options.resume, job=job)
    except TorchspecError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code_of(error)
    sys.stdout.write(f"{run.root}\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
