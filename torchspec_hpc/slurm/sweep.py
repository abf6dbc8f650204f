"""Many runs from one configuration: a grid, one job a run, so many of them at a time.

Slurm has no arrays of heterogeneous jobs.  What bounds the runs in flight are dependencies: run
``i`` starts when run ``i - n`` has ended.  So nothing has to keep running on the login node.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError, UserError
from torchspec_hpc.slurm.prepare import run_directory
from torchspec_hpc.slurm.record import RunRecord, open_jobs
from torchspec_hpc.slurm.scheduler import job_info
from torchspec_hpc.slurm.status import RunStatus, read_status
from torchspec_hpc.slurm.submit import submit

SWEEP = "sweep.json"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        name: Of the run.
        overrides: What makes it different from the others, as ``KEY=VALUE``.
    """

    name: str
    overrides: tuple[str, ...]


def read_grid(grid: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of ``KEY=VALUE,VALUE,...`` axes.

    Raises:
        ConfigError: An axis is not of that form, or is given twice.
    """
    axes = []
    for text in grid:
        key, _, values = text.partition("=")
        if not key or not values:
            raise ConfigError(f"--grid {text!r}", allowed="KEY=VALUE,VALUE,...")
        axes.append([f"{key}={value}" for value in values.split(",")])
    keys = [axis[0].partition("=")[0] for axis in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(f"--grid names a key twice: {', '.join(keys)}")
    return list(itertools.product(*axes))


def submit_sweep(
    path: Path, overrides: Sequence[str], grid: Sequence[str], name: str, in_flight: int
) -> Iterator[tuple[Trial, str]]:
    """Submits the runs of a sweep that have no job yet; so a sweep that broke off goes on.

    Args:
        path: Configuration of all runs.
        overrides: Of all runs.
        grid: ``KEY=VALUE,VALUE,...`` axes.
        name: Of the sweep, a directory below ``output_dir``.
        in_flight: Runs at a time.

    Yields:
        Each run and its job.

    Raises:
        UserError: The sweep exists with another grid, or a run is refused.
    """
    trials = [Trial(f"{name}-{i:03d}", combo) for i, combo in enumerate(read_grid(grid))]
    folder = Path(load_config(path, overrides).output_dir) / name
    # every configuration is looked at before the first one is submitted
    configs = [_config(path, overrides, folder, trial) for trial in trials]
    _remember(folder, trials)
    jobs: list[str] = []
    for trial, config in zip(trials, configs, strict=True):
        run = run_directory(config)
        jobs.append(_job_of(run) or _submit(config, jobs[-in_flight:], in_flight))
        yield trial, jobs[-1]


def read_sweep(folder: Path) -> list[tuple[Trial, RunStatus | None]]:
    """The runs of a sweep and how they are doing; None: not submitted yet.

    Raises:
        UserError: The directory holds no sweep.
        SchedulerError: The controller does not answer.
    """
    trials = _read(folder)
    if trials is None:
        raise UserError(f"{folder} holds no {SWEEP}", hint="give CONFIG --grid ..., or its folder")
    runs = [RunDir(folder / trial.name) for trial in trials]
    found = {s.run: s for s in read_status(run for run in runs if _is_there(run))}
    return [(t, found.get(str(run.root))) for t, run in zip(trials, runs, strict=True)]


def _submit(config: Config, before: Sequence[str], in_flight: int) -> str:
    """Submits one run, after the first of so many before it."""
    after = before[0] if len(before) == in_flight and not job_info(before[0]).ended else None
    resume = _is_there(run_directory(config))
    return submit(config, resume=resume, after=after).job_id


def _config(path: Path, overrides: Sequence[str], folder: Path, trial: Trial) -> Config:
    own = [f"output_dir={folder}", f"run_name={trial.name}", "cluster=slurm"]
    return load_config(path, [*overrides, *trial.overrides, *own])


def _remember(folder: Path, trials: Sequence[Trial]) -> None:
    known = _read(folder)
    if known is not None and known != trials:
        raise UserError(f"{folder} holds another sweep", hint="choose another --name")
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [{"name": t.name, "overrides": t.overrides} for t in trials]
    write_atomic(folder / SWEEP, {"trials": rows})


def _read(folder: Path) -> list[Trial] | None:
    path = folder / SWEEP
    if not path.is_file():
        return None
    rows = json.loads(path.read_text(encoding="utf-8"))["trials"]
    return [Trial(row["name"], tuple(row["overrides"])) for row in rows]


def _is_there(run: RunDir) -> bool:
    return run.run_json.is_file()


def _job_of(run: RunDir) -> str | None:
    """Its job, unless it never had one."""
    if not _is_there(run):
        return None
    if jobs := open_jobs(run):
        return jobs[0]
    record = RunRecord.read(run)
    return record.job_id if record else None
