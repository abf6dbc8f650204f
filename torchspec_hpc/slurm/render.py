"""The batch script of a run: one heterogeneous job, two components, one command.

Component 0 runs the engines, component 1 the trainers.  The script itself runs on the first
node of component 0 and turns into the supervisor, which starts the steps of both groups.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import SlurmConfig, SlurmGroupConfig
from torchspec_hpc.errors import ConfigError

#: The supervisor stops the trainers at this signal, ``slurm.signal_before_s`` before the limit.
WARNING_SIGNAL = "USR1"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# sbatch reads #SBATCH lines by rules of its own, in which a backslash counts inside quotes too
_UNQUOTABLE = re.compile(r"[\x00-\x1f\x7f'\"\\]")


def supervisor_command(config: Config, run: RunDir) -> list[str]:
    """What the batch script turns into."""
    python = config.slurm.python or sys.executable
    return [python, "-u", "-m", "torchspec_hpc.slurm.supervisor", "--run-dir", str(run.root)]


def render_script(config: Config, run: RunDir, command: Sequence[str] | None = None) -> str:
    """Renders the batch script.

    Args:
        config: The whole configuration; sizes come from ``inference`` and ``training``.
        run: Where the run lives; it need not exist yet.
        command: What to run instead of the supervisor.

    Raises:
        ConfigError: A setting cannot be written into a script, or memory is stated for one
            component only.
    """
    slurm, inference, training = config.slurm, config.inference, config.training
    if (slurm.inference.mem is None) != (slurm.training.mem is None):
        raise ConfigError(
            "slurm.inference.mem and slurm.training.mem: only one is set",
            hint="set both or none: srun fails where components mix --mem and --mem-per-cpu",
        )
    lines = [
        "#!/bin/bash",
        f"# Run {run.run_id}. Component 0, inference: this script runs on its first node.",
        *_job_options(slurm, run),
        *_component(slurm, slurm.inference, inference.num_nodes, inference.engines_per_node),
        *_gpus(slurm.inference, inference.num_gpus_per_node),
        *_extra(slurm.inference),
        "#SBATCH hetjob",
        "# Component 1, training: one torchrun per node.",
        *_component(slurm, slurm.training, training.training_num_nodes, tasks_per_node=1),
        *_gpus(slurm.training, training.training_num_gpus_per_node),
        *_extra(slurm.training),
        "",
        "set -euo pipefail",
        "",
        "# what component 0 asked for would otherwise hold for every srun, component 1's too",
        "unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE",
        "",
        *_setup(slurm),
        f"exec {shlex.join(command or supervisor_command(config, run))}",
    ]
    return "\n".join(lines) + "\n"


def _job_options(slurm: SlurmConfig, run: RunDir) -> list[str]:
    """Options of the job as a whole; Slurm takes them from component 0."""
    return [
        _option("job-name", run.root.name),
        _option("comment", run.run_id),
        # sbatch expands %, of which only the job id's is meant
        _option("output", f"{run.job}/".replace("%", "%%") + run.batch_log("%j").name),
        "#SBATCH --open-mode=append",  # otherwise a requeued job empties the file
        _option("time", slurm.time),
        _option("signal", f"B:{WARNING_SIGNAL}@{slurm.signal_before_s}"),
        "#SBATCH --requeue" if slurm.requeue else "#SBATCH --no-requeue",
    ]


def _component(
    slurm: SlurmConfig, group: SlurmGroupConfig, num_nodes: int, tasks_per_node: int
) -> list[str]:
    values = {
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "partition": group.partition,
        "constraint": group.constraint,
        "nodes": num_nodes,
        "ntasks-per-node": tasks_per_node,
        "cpus-per-task": group.cpus_per_task,
        "mem": group.mem,
    }
    return [_option(name, value) for name, value in values.items() if value is not None]


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


def _setup(slurm: SlurmConfig) -> list[str]:
    """The user's own shell lines; scripts of modules and conda often read unset variables."""
    if not slurm.setup:
        return []
    for line in slurm.setup:
        if line.lstrip().startswith("#SBATCH"):
            raise ConfigError(
                f"slurm.setup has {line!r}, which sbatch would ignore",
                hint="put sbatch options into slurm.inference.extra or slurm.training.extra",
            )
    return ["# slurm.setup", "set +u", *slurm.setup, "set -u", ""]


def _option(name: str, value: object) -> str:
    text = str(value)
    if not text or _UNQUOTABLE.search(text):
        raise ConfigError(
            f"--{name}={text!r} cannot be written into a batch script",
            allowed="one line without quotes and backslashes",
        )
    return f"#SBATCH --{name}={shlex.quote(text)}"
