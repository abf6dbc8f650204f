"""Submits a job of engines that join a run: see :mod:`torchspec_hpc.slurm.join`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError, UserError
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.render import render_script
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.scheduler import check_submission, refused, run_client, sbatch_command
from torchspec_hpc.slurm.shape import Component, components

_SUFFIX = "-join"
#: Settings of the engines that a job which joins may change.
_OF_THIS_JOB = ("inference_num_gpus", "inference_num_gpus_per_node")


def submit_join(run: RunDir, overrides: Sequence[str] = ()) -> str:
    """Submits the job and returns its id.

    Args:
        run: A run that waits or runs as a Slurm job.
        overrides: Settings of this job: ``slurm.inference.partition`` and the number of GPUs
            above all.

    Raises:
        UserError: There is no such run, it is complete, or Slurm refuses the job.
        ConfigError: The engines cannot be laid out as those of the run are.
    """
    _check_run(run)
    config = load_config(run.config, list(overrides))
    _check_layout(config, load_config(run.config))
    script = render_join(config, run, overrides)
    check_submission(script)
    path = run.job / f"join_{len(list(run.job.glob('join_*.sbatch')))}.sbatch"
    path.write_text(script, encoding="utf-8")
    done = run_client(sbatch_command("--parsable", str(path)))
    if done.returncode:
        raise refused(done.stderr)
    return done.stdout.strip().split(";")[0]


def render_join(config: Config, run: RunDir, overrides: Sequence[str]) -> str:
    """The batch script: the engines' component, and nothing else."""
    python = Runtime(config, run).node_python
    module = [python, "-u", "-m", "torchspec_hpc.slurm.join", "--run-dir", str(run.root)]
    part = replace(_engines(config), title="Engines that join it.")
    return render_script(config, run, [*module, *overrides], [part], _SUFFIX)


def _engines(config: Config) -> Component:
    het = config.slurm.model_copy(update={"topology": "het"})
    return components(config.model_copy(update={"slurm": het}))[0]


def _check_run(run: RunDir) -> None:
    record = RunRecord.read(run)
    if record is None:
        raise UserError(f"there is no run in {run.root}", hint="give the directory of a run")
    if record.cluster != "slurm":
        raise UserError(
            f"the run {run.root} has cluster: {record.cluster}: no other node reaches it",
            allowed="runs that were submitted to Slurm",
        )
    if run.done.exists():
        raise UserError(f"the run {run.root} is complete", hint="no engine can help it any more")


def _check_layout(config: Config, own: Config) -> None:
    """The engines read the run's configuration, and an engine's GPUs follow from its rank there."""
    given, theirs = config.inference.model_dump(), own.inference.model_dump()
    changed = [name for name in given if given[name] != theirs[name] and name not in _OF_THIS_JOB]
    if changed:
        raise ConfigError(
            f"inference.{changed[0]} is {given[changed[0]]} here and {theirs[changed[0]]} in the "
            "run, whose configuration the engines read",
            allowed=f"changes of slurm.* and of inference.{', inference.'.join(_OF_THIS_JOB)}",
        )
    found, wanted = config.inference.ranks_per_node, own.inference.ranks_per_node
    if found > wanted or (found < wanted and config.inference.num_nodes > 1):
        raise ConfigError(
            f"this job would run {found} engines on a node, the run itself has {wanted}",
            allowed=f"{wanted}, or fewer on a single node",
            hint="change inference.inference_num_gpus or inference.inference_num_gpus_per_node",
        )
