"""The steps of a heterogeneous job: how ``srun`` starts them."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import SlurmGroupConfig
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.slurm.env import (
    INFERENCE_GROUP,
    TRAINING_GROUP,
    attempt,
    job_id,
    node_addresses,
    read_het_groups,
)
from torchspec_hpc.slurm.job import Job, JobFate
from torchspec_hpc.slurm.processes import Child, shepherded
from torchspec_hpc.slurm.steps import (
    INFERENCE,
    TRAINING,
    Modules,
    Step,
    engine_shepherd_options,
    trainer_shepherd_options,
    worker_environment,
)

logger = logging.getLogger(__name__)

#: Where there is no way to look for a free port on another node: below the ports that Linux
#: hands out, above the well-known ones.
_RENDEZVOUS_PORTS = range(20000, 30000)
#: After the first task of a step has ended the others get so long.
_SRUN_WAIT_S = 60
# What srun takes for options that contradict ours: they describe component 0. And its devices.
_OF_COMPONENT_0 = (
    "SLURM_MEM_PER_", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_",
    "SLURM_GPUS", "SLURM_GRES", "SLURM_TRES_PER_TASK", "SLURM_DISTRIBUTION",
    "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL",
)  # fmt: skip


class SlurmLauncher:
    """Starts the steps of a heterogeneous job; this process is its batch script.

    Args:
        run: The run.
        config: Its settings.
        environ: Environment of the batch script.
        modules: What the steps run.
    """

    def __init__(
        self,
        run: RunDir,
        config: Config,
        environ: Mapping[str, str],
        modules: Modules = Modules(),  # noqa: B008 - frozen
    ) -> None:
        self._run, self._config, self.modules = run, config, modules
        self._python = config.slurm.python or sys.executable
        self._environ = {k: v for k, v in environ.items() if not k.startswith(_OF_COMPONENT_0)}
        groups = read_het_groups(environ)
        self._trainer_node = groups[TRAINING_GROUP].nodes[0]
        self.addresses = node_addresses(node for group in groups for node in group.nodes)
        here = groups[INFERENCE_GROUP].nodes[0]
        self.host = self.addresses[here] = config.control.host or own_ip(self.addresses[here])
        self.job_id: str | None = job_id(environ)
        self.can_requeue = config.slurm.requeue
        self._job = Job(self.job_id, attempt(environ), len(groups))

    def start_inference(self, logs: Path) -> Step:
        """One task an engine; the step lasts as long as one of them does."""
        if "HF_HUB_OFFLINE" not in self._environ:
            logger.info("workers use cached files of the Hugging Face hub only (HF_HUB_OFFLINE=1)")
        inference, group = self._config.inference, self._config.slurm.inference
        options = [
            f"--het-group={INFERENCE_GROUP}",
            f"--nodes={inference.num_nodes}",
            f"--ntasks={inference.num_engines}",
            f"--ntasks-per-node={inference.engines_per_node}",
            "--distribution=block",  # engines choose their GPUs by rank
            *_resources(group, inference.num_gpus_per_node),
            "--kill-on-bad-exit=0",
            "--wait=0",  # nor does the end of one end the others after a while
            "--disable-status",  # forward the first SIGINT to the engines
        ]
        engine = self.modules.engine_command(self._run, self._python)
        command = shepherded(
            engine, *engine_shepherd_options(self._run, self._config.control), python=self._python
        )
        threads = inference.num_threads or group.cpus_per_task
        return self._srun(INFERENCE, options, command, threads, logs)

    def start_training(self, logs: Path) -> Step:
        """One task a node: torchrun."""
        training, group = self._config.training, self._config.slurm.training
        num_nodes, per_node = training.training_num_nodes, training.training_num_gpus_per_node
        options = [
            f"--het-group={TRAINING_GROUP}",
            f"--nodes={num_nodes}",
            f"--ntasks={num_nodes}",
            "--ntasks-per-node=1",
            *_resources(group, per_node),
            # with kill-on-bad-exit a node that says "requeue me" would kill one that is
            # about to, and srun would say 143
            "--kill-on-bad-exit=0",
            f"--wait={_SRUN_WAIT_S}",
        ]
        address, port = self.addresses[self._trainer_node], secrets.choice(_RENDEZVOUS_PORTS)
        command = shepherded(
            self.modules.trainer_command(self._run, training, self._python, address, port),
            *trainer_shepherd_options(self._run),
            python=self._python,
        )
        threads = training.num_threads or max(1, group.cpus_per_task // per_node)
        return self._srun(TRAINING, options, command, threads, logs)

    def fate(self) -> JobFate:
        """What becomes of this job."""
        return self._job.fate()

    def requeue(self) -> None:
        """Puts the job back into the queue.

        Raises:
            TorchspecError: Slurm refuses.
        """
        self._job.requeue()

    def how_to_continue(self) -> str:
        """What a person does to go on with this run."""
        return f"torchspec-hpc submit {self._run.config} --resume"

    def _srun(
        self, name: str, options: list[str], command: list[str], num_threads: int, logs: Path
    ) -> Step:
        argv = ["srun", *options, "--mem=0", "--unbuffered", "--label", "--export=ALL", *command]
        env = worker_environment(self._config, self._environ, num_threads)
        # SIGTERM makes srun kill its tasks
        return Step(name, [Child(argv, logs / f"{name}_step.log", env)], signal.SIGTERM)


def own_ip(address: str) -> str:
    """This node's address as a number: servers bind to it and other nodes are told it.

    Raises:
        TorchspecError: It is a name that does not resolve, or that this node resolves to
            itself alone, as Debian's ``127.0.1.1``.
    """
    try:
        found = socket.getaddrinfo(address, None, proto=socket.IPPROTO_TCP)[0][4][0]
    except OSError as error:
        raise TorchspecError(
            f"this node's address {address!r} does not resolve: {error}\n"
            "  next:    set control.host"
        ) from error
    if found != address and str(found).startswith("127."):
        raise TorchspecError(
            f"this node's name {address!r} resolves to {found}, where no other node reaches it\n"
            "  next:    set control.host to its address in the cluster's network"
        )
    return str(found)


def _resources(group: SlurmGroupConfig, num_gpus: int) -> list[str]:
    """CPUs of a task and GPUs of a node, in the words that the job was asked for with."""
    gpus = f"{group.gpu_type}:{num_gpus}" if group.gpu_type else str(num_gpus)
    flags = {"gres": [f"--gres=gpu:{gpus}"], "gpus-per-node": [f"--gpus-per-node={gpus}"]}
    return [f"--cpus-per-task={group.cpus_per_task}", *flags.get(group.gpus, [])]
