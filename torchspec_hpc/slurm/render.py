"""The batch script of a run: one job, two groups, one command.

The script runs on the first node of the engines and turns into the supervisor, which starts the
steps of both groups.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import SlurmConfig, SlurmGroupConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.shape import Component, components

#: The supervisor stops the trainers at this signal, ``slurm.signal_before_s`` before the limit.
WARNING_SIGNAL = "USR1"

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# sbatch reads #SBATCH lines by rules of its own, in which a backslash counts inside quotes too
_UNQUOTABLE = re.compile(r"[\x00-\x1f\x7f'\"\\]")


def supervisor_command(config: Config, run: RunDir) -> list[str]:
    """What the batch script turns into."""
    python = Runtime(config, run).node_python
    return [python, "-u", "-m", "torchspec_hpc.slurm.supervisor", "--run-dir", str(run.root)]


def render_script(
    config: Config,
    run: RunDir,
    command: Sequence[str] | None = None,
    parts: Sequence[Component] | None = None,
    suffix: str = "",
) -> str:
    """Renders the batch script.

    Args:
        config: The whole configuration; sizes come from ``inference`` and ``training``.
        run: Where the run lives; it need not exist yet.
        command: What to run instead of the supervisor.
        parts: What to allocate instead of the run's own components.
        suffix: Tells the job from the run's own, by its name and comment.

    Raises:
        ConfigError: A setting cannot be written into a script, memory is stated for one
            component only, or the groups do not fit on one node and are to share it.
    """
    slurm = config.slurm
    first, *others = parts or components(config)
    if (slurm.inference.mem is None) != (slurm.training.mem is None):
        raise ConfigError(
            "slurm.inference.mem and slurm.training.mem: only one is set",
            hint="set both or none: srun fails where components mix --mem and --mem-per-cpu",
        )
    lines = [
        "#!/bin/bash",
        f"# Run {run.run_id}. {first.title}",
        *_job_options(slurm, run, suffix),
        *_component(slurm, first),
    ]
    for component in others:
        lines += ["#SBATCH hetjob", f"# {component.title}", *_component(slurm, component)]
    lines += [
        "",
        "set -euo pipefail",
        "",
        "# what the job asked for would otherwise hold for every srun, of whatever group",
        "unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE",
        "",
        *setup_lines(config, Runtime(config, run)),
        "# the code as it was when the job was submitted",
        f"cd {shlex.quote(str(run.code))}",
        'export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"',
        "",
        f"exec {shlex.join(command or supervisor_command(config, run))}",
    ]
    return "\n".join(lines) + "\n"


def _job_options(slurm: SlurmConfig, run: RunDir, suffix: str) -> list[str]:
    """Options of the job as a whole; Slurm takes them from component 0."""
    return [
        _option("job-name", run.root.name + suffix),
        _option("comment", run.run_id + suffix),
        # sbatch expands %, of which only the job id's is meant
        _option("output", f"{run.job}/".replace("%", "%%") + run.batch_log("%j").name),
        "#SBATCH --open-mode=append",  # otherwise a requeued job empties the file
        _option("time", slurm.time),
        _option("signal", f"B:{WARNING_SIGNAL}@{slurm.signal_before_s}"),
        "#SBATCH --requeue" if slurm.resume == "requeue" else "#SBATCH --no-requeue",
    ]


def _component(slurm: SlurmConfig, component: Component) -> list[str]:
    options = component.options
    values = {
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "partition": options.partition,
        "constraint": options.constraint,
        "nodes": component.num_nodes,
        "ntasks-per-node": component.tasks_per_node,
        "cpus-per-task": component.cpus_per_task,
        "mem": options.mem,
    }
    lines = [_option(name, value) for name, value in values.items() if value is not None]
    return [*lines, *_gpus(options, component.gpus_per_node), *_extra(options)]


def _gpus(group: SlurmGroupConfig, num_per_node: int) -> list[str]:
    gpus = f"{group.gpu_type}:{num_per_node}" if group.gpu_type else str(num_per_node)
    match group.gpus:
        case "gres":
            return [_option("gres", f"gpu:{gpus}")]
        case "gpus-per-node":
            return [_option("gpus-per-node", gpus)]
        case "none":
            return []


def _extra(group: SlurmGroupConfig) -> list[str]:
    for option in group.extra:
        if not option.startswith("-") or _CONTROL.search(option):
            raise ConfigError(
                f"slurm extra option {option!r} cannot be written into a batch script",
                allowed="one sbatch option each, such as --exclusive or --nodelist=n[1-4]",
            )
    return [f"#SBATCH {option}" for option in group.extra]


def setup_lines(config: Config, runtime: Runtime) -> list[str]:
    """The user's own lines; scripts of modules and conda often read unset variables."""
    slurm = config.slurm
    for line in slurm.setup:
        if line.lstrip().startswith("#SBATCH"):
            raise ConfigError(
                f"slurm.setup has {line!r}, which sbatch would ignore",
                hint="put sbatch options into slurm.inference.extra or slurm.training.extra",
            )
    lines = [*slurm.setup, *runtime.script_lines]
    if lines:
        lines = ["# slurm.setup and slurm.runtime", "set +u", *lines, "set -u", ""]
    if slurm.environment:
        lines += ["# slurm.environment", *map(_export, slurm.environment.items()), ""]
    return lines


def _export(variable: tuple[str, str]) -> str:
    name, value = variable
    if not _VARIABLE.fullmatch(name) or _CONTROL.search(value):
        raise ConfigError(
            f"slurm.environment: {name}={value!r} cannot be written into a batch script",
            allowed="names of letters, digits and _; values of one line",
        )
    return f"export {name}={shlex.quote(value)}"


def _option(name: str, value: object) -> str:
    text = str(value)
    if not text or _UNQUOTABLE.search(text):
        raise ConfigError(
            f"--{name}={text!r} cannot be written into a batch script",
            allowed="one line without quotes and backslashes",
        )
    return f"#SBATCH --{name}={shlex.quote(text)}"
