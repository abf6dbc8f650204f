"""A run without Slurm: the same supervisor and the same commands, as processes of this machine."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from torchspec_hpc.config.endpoints import node_name
from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.ports import free_port
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.job import JobFate
from torchspec_hpc.slurm.processes import Child, shepherded
from torchspec_hpc.slurm.steps import (
    INFERENCE,
    TRAINING,
    Modules,
    ServiceRuntime,
    Step,
    engine_shepherd_options,
    trainer_shepherd_options,
    worker_environment,
)
from torchspec_hpc.slurm.supervisor import Supervisor

logger = logging.getLogger(__name__)

_LOOPBACK = "127.0.0.1"
_NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")


def run_local(run: RunDir) -> int:
    """Runs one attempt in the foreground and returns its exit code.

    Ctrl-C asks for a checkpoint; a second one kills.
    """
    config = load_config(run.config)
    return Supervisor(run, config, LocalLauncher(run, config, os.environ)).run()


class LocalLauncher:
    """Starts every worker as a process of this machine.

    Args:
        run: The run.
        config: Its settings.
        environ: Environment of the workers.
        modules: What the steps run.

    Raises:
        ConfigError: The configuration asks for more than one node.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        environ: Mapping[str, str],
        modules: Modules = Modules(),  # noqa: B008 - frozen
    ) -> None:
        if config.training.training_num_nodes != 1:
            raise ConfigError(
                f"training.training_num_nodes = {config.training.training_num_nodes} "
                "with cluster: local",
                allowed="1",
                hint="use cluster: slurm for more nodes",
            )
        if config.inference.nodes_per_engine != 1:
            raise ConfigError(
                f"an engine has {config.inference.nodes_per_engine} nodes with cluster: local "
                "(inference_num_gpus_per_engine, inference_num_gpus_per_node)",
                allowed="engines that fit on this machine",
                hint="use cluster: slurm for more nodes",
            )
        self._run, self._config, self.modules = run, config, modules
        self.services = ServiceRuntime()
        self.job_id: str | None = None
        self.can_requeue = False
        # a shell inside a Slurm allocation must not make the workers believe to be tasks of it
        self._environ = {k: v for k, v in environ.items() if not k.startswith("SLURM_")}
        self.host = config.control.host or _LOOPBACK
        self.addresses = {node_name(): self.host}
        engines, trainers = split_gpus(config, _visible_gpus(environ))
        self._engine_gpus, self._trainer_gpus = engines, trainers

    def start_inference(self, logs: Path) -> Step:
        """One process an engine."""
        inference = self._config.inference
        children = []
        for rank in range(inference.num_engines):
            command = self.modules.engine_command(self._run, sys.executable)
            command += ["--rank", str(rank), "--num-ranks", str(inference.num_engines)]
            env = self._worker_environment(inference.num_threads, self._engine_gpus[rank])
            argv = shepherded(
                command, *engine_shepherd_options(self._run, self._config.control, rank)
            )
            children.append(Child(argv, logs / f"{INFERENCE}_step.log", env))
        return Step(INFERENCE, children, signal.SIGQUIT)

    def start_training(self, logs: Path) -> Step:
        """One torchrun."""
        training = self._config.training
        command = self.modules.trainer_command(
            self._run, training, sys.executable, self.host, free_port(self.host)
        )
        argv = shepherded(command, *trainer_shepherd_options(self._run))
        env = self._worker_environment(training.num_threads, self._trainer_gpus)
        return Step(TRAINING, [Child(argv, logs / f"{TRAINING}_step.log", env)], signal.SIGQUIT)

    def fate(self) -> JobFate:
        """Without a scheduler nothing becomes of a run but what it does itself."""
        return JobFate.RUNNING

    def requeue(self) -> None:
        """There is no queue."""
        raise AssertionError("a local run is not requeued")

    def how_to_continue(self) -> str:
        """What a person does to go on with this run."""
        return f"torchspec-hpc run {self._run.config} --resume"

    def _worker_environment(self, num_threads: int | None, gpus: list[str]) -> dict[str, str]:
        env = worker_environment(self._config, self._environ, num_threads)
        return {**env, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else env


def split_gpus(config: Config, visible: list[str]) -> tuple[list[list[str]], list[str]]:
    """Shares this machine's GPUs out: engines first, then trainers.

    Where there are too few, engines and trainers share them from the first one on: a laptop
    with one GPU runs everything on it.

    Args:
        config: The run's settings.
        visible: Names of the GPUs, as in ``CUDA_VISIBLE_DEVICES``.

    Returns:
        The GPUs of each engine, and those of the trainers; empty lists where there are none.
    """
    inference, per_engine = config.inference, config.inference.inference_num_gpus_per_engine
    num_trainers = config.training.training_num_gpus_per_node
    if not visible:
        return [[] for _ in range(inference.num_engines)], []
    wanted = inference.inference_num_gpus + num_trainers
    if wanted > len(visible):
        logger.warning(
            "%d GPUs are visible and %d are asked for: engines and trainers share them",
            len(visible),
            wanted,
        )
        per_engine, num_trainers = min(per_engine, len(visible)), min(num_trainers, len(visible))
        return [visible[:per_engine] for _ in range(inference.num_engines)], visible[:num_trainers]
    engines = [visible[i * per_engine :][:per_engine] for i in range(inference.num_engines)]
    return engines, visible[inference.inference_num_gpus : wanted]


def _visible_gpus(environ: Mapping[str, str]) -> list[str]:
    if (value := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in value.split(",") if name]
    try:
        return [str(index) for index, _ in enumerate(_NVIDIA_DEVICES.iterdir())]
    except OSError:  # no driver
        return []
