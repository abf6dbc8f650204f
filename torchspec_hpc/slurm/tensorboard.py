"""TensorBoard where others are logged in too: loopback, little memory, seldom reload.

It has no authentication, so nobody but this machine may reach it; ``ssh -L`` does the rest.
"""

from __future__ import annotations

import getpass
import resource
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.ports import free_port, require_bindable
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.slurm.record import require_run
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.scheduler import refused, run_client, sbatch_command

_LOOPBACK = "127.0.0.1"
_RELOAD_S = 120
#: Points of a curve that are kept in memory.
_SAMPLES = 1000


@dataclass(frozen=True)
class Tensorboard:
    """A TensorBoard for some runs.

    Attributes:
        runs: Whose curves.
        port: Of the loopback interface.
    """

    runs: Sequence[RunDir]
    port: int

    @classmethod
    def on_port(cls, runs: Sequence[RunDir], port: int) -> Tensorboard:
        """On this port, or, with 0, on any free one.

        Raises:
            UserError: The port is taken, or one of the runs is none.
        """
        for run in runs:
            require_run(run)
        require_bindable(_LOOPBACK, port, "--port")
        return cls(runs, port or free_port(_LOOPBACK))

    @property
    def command(self) -> list[str]:
        """What serves it."""
        if len(self.runs) == 1:
            where = ["--logdir", str(self.runs[0].tensorboard)]
        else:
            named = (f"{run.root.name}:{run.tensorboard}" for run in self.runs)
            where = ["--logdir_spec", ",".join(named)]
        return [
            *(sys.executable, "-m", "tensorboard.main", *where),
            *("--host", _LOOPBACK, "--port", str(self.port)),
            *("--reload_interval", str(_RELOAD_S), "--samples_per_plugin", f"scalars={_SAMPLES}"),
        ]

    @property
    def url(self) -> str:
        """Where a browser finds it, once the tunnel is open."""
        return f"http://localhost:{self.port}"

    def tunnel(self, jump: str | None = None) -> str:
        """The command to type on one's own computer.

        Args:
            jump: The login node, where this is a compute node.
        """
        user = getpass.getuser()
        via = f"-J {user}@{jump} " if jump else ""
        ports = f"{self.port}:{_LOOPBACK}:{self.port}"
        return f"ssh -N -L {ports} {via}{user}@{socket.getfqdn()}"


def limit_memory(num_bytes: int) -> None:
    """Has this process, and what it becomes, end rather than take more than so many bytes."""
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))


def submit_tensorboard(runs: Sequence[RunDir], time_limit: str) -> tuple[str, Path]:
    """Serves from a small job of the first run's account, in its training partition.

    Args:
        runs: Whose curves.
        time_limit: As in ``sbatch --time``.

    Returns:
        The job, and the log that will hold the tunnel's command once it runs.

    Raises:
        UserError: Slurm refuses the job, or one of the runs is none.
    """
    for run in runs:
        require_run(run)
    first = runs[0]
    config = load_config(first.config)
    slurm, python = config.slurm, Runtime(config, first).node_python
    folders = [str(run.root) for run in runs]
    program = [python, "-m", "torchspec_hpc.cli.main", "tb", *folders, "--jump", socket.getfqdn()]
    options = {
        "job-name": "tensorboard",
        "output": f"{first.job}/tensorboard-%j.out".replace("%", "%%").replace("%%j", "%j"),
        "time": time_limit,
        "cpus-per-task": 2,
        "mem": "4G",
        "account": slurm.account,
        "qos": slurm.qos,
        "partition": slurm.training.partition,
        "wrap": shlex.join(program),
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    done = run_client(sbatch_command("--parsable", *given))
    if done.returncode:
        raise refused(done.stderr)
    job_id = done.stdout.strip().split(";")[0]
    return job_id, first.job / f"tensorboard-{job_id}.out"
