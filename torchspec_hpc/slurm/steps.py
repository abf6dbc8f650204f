"""The two steps of an attempt, the commands of their workers, and what starts them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torchspec_hpc.config.endpoints import INTERFACE_VARIABLE
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config, TrainingConfig
from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.slurm.job import JobFate
from torchspec_hpc.slurm.processes import Child, tail

INFERENCE, TRAINING = "inference", "training"

#: torchrun kills what has not ended so long after the first of its processes failed.  SIGTERM,
#: which it sends first, does not reach them: see shepherd.py.
_TORCHRUN_KILL_S = 10
_KILL_S = 20.0


class Step:
    """The processes of the inference or of the training group.

    Args:
        name: ``inference`` or ``training``.
        children: Its processes on this node: shepherds of workers, or one ``srun``.
        kill_signal: What makes them end at once, with everything below them.
    """

    def __init__(self, name: str, children: Sequence[Child], kill_signal: signal.Signals) -> None:
        self.name, self._children, self._kill_signal = name, children, kill_signal

    def poll(self) -> int | None:
        """None while a process runs; then the first exit code that is not 0, or 0."""
        codes = [child.poll() for child in self._children]
        return None if None in codes else next(filter(None, codes), 0)

    def interrupt(self, grace_s: float) -> None:
        """Asks the workers to end, and kills those that have not in time."""
        for child in self._children:
            child.signal(signal.SIGINT)
        ended = [child.wait(grace_s) is not None for child in self._children]
        if not all(ended):
            self.kill()

    def kill(self) -> None:
        """Ends every process at once."""
        for child in self._children:
            child.signal(self._kill_signal)
        for child in self._children:
            child.end(self._kill_signal, _KILL_S)

    def log_tail(self) -> str:
        """The last lines of its log."""
        return tail(self._children[0].log)


@dataclass(frozen=True)
class ServiceRuntime:
    """What the services of this node run in.

    Attributes:
        python: Interpreter.
        in_container: It is not one of this node.
        enter: From a command to what starts it here.
    """

    python: str = sys.executable
    in_container: bool = False
    enter: Callable[[Sequence[str]], list[str]] = list


class Launcher(Protocol):
    """Where a run runs: in a Slurm job, or as processes of this machine."""

    modules: Modules
    services: ServiceRuntime
    #: Of the Slurm job.
    job_id: str | None
    #: Address of this node, for services to bind.
    host: str
    #: Node name -> address of every node of the run.
    addresses: dict[str, str]
    #: Whether the scheduler may start the run again.
    can_requeue: bool

    def start_inference(self, logs: Path) -> Step:
        """Starts all engines."""
        ...

    def start_training(self, logs: Path) -> Step:
        """Starts torchrun on every trainer node."""
        ...

    def fate(self) -> JobFate:
        """What becomes of this run's job, as its scheduler sees it."""
        ...

    def requeue(self) -> None:
        """Has the scheduler start the run again.

        Raises:
            TorchspecError: The scheduler refuses.
        """
        ...

    def how_to_continue(self) -> str:
        """What a person does to go on with this run."""
        ...


@dataclass(frozen=True)
class Modules:
    """The modules that an attempt runs; tests have their own."""

    control_store: str = "torchspec_hpc.transfer.control_server"
    engine: str = "torchspec_hpc.inference.worker"
    torchrun: str = "torchspec_hpc.training.launch"
    trainer: str = "torchspec_hpc.training.worker"

    def engine_command(self, run: RunDir, python: str) -> list[str]:
        """One engine, which has its rank from Slurm unless told otherwise."""
        return [python, "-m", self.engine, "--run-dir", str(run.root)]

    def trainer_command(
        self, run: RunDir, config: TrainingConfig, python: str, address: str, port: int
    ) -> list[str]:
        """Torchrun of one node, which takes its node rank from ``PET_NODE_RANK``.

        Static rendezvous: ranks follow the order of the nodes, and nothing is agreed upon at
        run time.  Slurm restarts, torchrun does not.

        Args:
            run: The run.
            config: Number of nodes and of trainers on each.
            python: Interpreter on the trainer nodes.
            address: Of the first trainer node.
            port: Free on that node.
        """
        return [
            python,
            "-m",
            self.torchrun,
            f"--nnodes={config.training_num_nodes}",
            f"--nproc-per-node={config.training_num_gpus_per_node}",
            f"--master-addr={address}",
            f"--master-port={port}",
            "--max-restarts=0",
            "-m",
            self.trainer,
            "--run-dir",
            str(run.root),
        ]


def trainer_shepherd_options(run: RunDir) -> list[str]:
    """A trainer node writes the stop file when it is signalled, and says which node it is."""
    return [f"--stop-file={run.stop}", "--copy-env=SLURM_NODEID=PET_NODE_RANK"]


def engine_shepherd_options(run: RunDir, control: ControlConfig, first_rank: int = 0) -> list[str]:
    """An engine that dies is started again, and is not ready meanwhile.

    Args:
        run: The run.
        control: How often.
        first_rank: Rank of the engine; under Slurm of the step's first task.
    """
    return [
        f"--restarts={control.engine_restarts}",
        f"--first-rank={first_rank}",
        f"--ready-file={run.ready}/{INFERENCE}_{{rank}}.json",
    ]


def worker_environment(
    config: Config, base: Mapping[str, str], num_threads: int | None
) -> dict[str, str]:
    """Environment of the workers of one group.

    Args:
        config: The run's settings.
        base: Environment of the supervisor; what it sets already stays.
        num_threads: CPU threads of one worker; None leaves the choice to torch.
    """
    defaults = {
        "PYTHONUNBUFFERED": "1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_TORCHRUN_KILL_S),
    }
    if config.cluster == "slurm":
        defaults["HF_HUB_OFFLINE"] = "1"  # compute nodes download nothing
    if interface := config.slurm.network_interface:
        names = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", INTERFACE_VARIABLE
        defaults |= dict.fromkeys(names, interface)
    if num_threads is not None:
        defaults["OMP_NUM_THREADS"] = str(num_threads)
    return {**defaults, **base}
