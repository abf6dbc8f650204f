"""The steps of a Slurm job: how ``srun`` starts them."""

from __future__ import annotations

import logging
import secrets
import signal
import socket
from collections.abc import Mapping
from pathlib import Path

from torchspec_hpc.config.interfaces import interface_address
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.slurm.env import attempt, job_id, node_addresses, read_nodes
from torchspec_hpc.slurm.job import Job, JobFate
from torchspec_hpc.slurm.processes import Child, shepherded
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.runtime import Runtime
from torchspec_hpc.slurm.shape import Group, components, inference_group, training_group
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


#: How ``srun`` treats engines.
ENGINE_STEP = [
    "--distribution=block",  # engines choose their GPUs by rank
    "--kill-on-bad-exit=0",
    "--wait=0",  # nor does the end of one end the others after a while
    "--disable-status",  # forward the first SIGINT to the engines
]


class SlurmLauncher:
    """Starts the steps of both groups; this process is the job's batch script.

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
        self._runtime = Runtime(config, run)
        self._python = self._runtime.worker_python
        self._environ = step_environment(environ)
        self._nodes = nodes = read_nodes(environ, config)
        self.addresses = node_addresses(dict.fromkeys(nodes.inference + nodes.training))
        here = (nodes.inference or nodes.training)[0]
        self.host = self.addresses[here] = _own_address(config, self.addresses[here])
        here_only = [*self._placement(INFERENCE), f"--nodelist={here}"]
        self.services = ServiceRuntime(
            python=self._python,
            in_container=config.slurm.runtime.is_container,
            enter=lambda command: self._runtime.service(command, here_only),
        )
        self.job_id: str | None = job_id(environ)
        self.can_requeue = config.slurm.resume != "none"
        self._job = Job(self.job_id, attempt(environ), len(components(config)))

    def start_inference(self, logs: Path) -> Step:
        """One task an engine; the step lasts as long as one of them does."""
        if "HF_HUB_OFFLINE" not in self._environ:
            logger.info("workers use cached files of the Hugging Face hub only (HF_HUB_OFFLINE=1)")
        group = inference_group(self._config)
        options = [
            *self._placement(INFERENCE),
            *step_resources(group),
            *ENGINE_STEP,
        ]
        command = shepherded(
            self._runtime.enter(self.modules.engine_command(self._run, self._python)),
            *engine_shepherd_options(self._run, self._config.control),
            python=self._runtime.shepherd_python,
        )
        threads = self._config.inference.num_threads or group.options.cpus_per_task
        return self._srun(INFERENCE, options, command, threads, logs)

    def start_training(self, logs: Path) -> Step:
        """One task a node: torchrun."""
        training, group = self._config.training, training_group(self._config)
        options = [
            *self._placement(TRAINING),
            *step_resources(group),
            # with kill-on-bad-exit a node that says "requeue me" would kill one that is
            # about to, and srun would say 143
            "--kill-on-bad-exit=0",
            f"--wait={_SRUN_WAIT_S}",
        ]
        address = self.addresses[self._nodes.training[0]]
        trainer = self.modules.trainer_command(
            self._run, training, self._python, address, secrets.choice(_RENDEZVOUS_PORTS)
        )
        command = shepherded(
            self._runtime.enter(trainer),
            *trainer_shepherd_options(self._run),
            python=self._runtime.shepherd_python,
        )
        threads = training.num_threads or max(1, group.options.cpus_per_task // group.gpus_per_node)
        return self._srun(TRAINING, options, command, threads, logs)

    def fate(self) -> JobFate:
        """What becomes of this job."""
        return self._job.fate()

    def requeue(self) -> None:
        """Puts the job back into the queue, or submits the one that goes on.

        Raises:
            TorchspecError: Slurm refuses.
        """
        if self._config.slurm.resume == "requeue":
            self._job.requeue()
            return
        follower = self._job.chain(self._run.newest_script())
        RunRecord(self._run.run_id, self._config.cluster, follower).write(self._run)
        logger.info("job %s goes on when this one has ended", follower)

    def how_to_continue(self) -> str:
        """What a person does to go on with this run."""
        return f"torchspec-hpc submit {self._run.config} --resume"

    def _srun(
        self, name: str, options: list[str], command: list[str], num_threads: int, logs: Path
    ) -> Step:
        options += [*self._runtime.srun_options, "--mem=0", "--unbuffered", "--label"]
        argv = ["srun", *options, "--export=ALL", *command]
        env = worker_environment(self._config, self._environ, num_threads)
        # SIGTERM makes srun kill its tasks
        return Step(name, [Child(argv, logs / f"{name}_step.log", env)], signal.SIGTERM)

    def _placement(self, name: str) -> list[str]:
        """Which nodes of the job are the group's."""
        match self._config.slurm.topology:
            case "het":
                return [f"--het-group={(INFERENCE, TRAINING).index(name)}"]
            case "single":
                return [f"--nodelist={','.join(getattr(self._nodes, name))}"]
            case "one_node":
                return ["--exact"]  # leave the other group its CPUs and GPUs


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Environment of the batch script without what contradicts the options of a step."""
    return {k: v for k, v in environ.items() if not k.startswith(_OF_COMPONENT_0)}


def step_resources(group: Group) -> list[str]:
    """What a step needs, in the words that the job was asked for with."""
    options, per_node = group.options, group.gpus_per_node
    num = f"{options.gpu_type}:{per_node}" if options.gpu_type else str(per_node)
    gpus = {"gres": [f"--gres=gpu:{num}"], "gpus-per-node": [f"--gpus-per-node={num}"]}
    return [
        f"--nodes={group.num_nodes}",
        f"--ntasks={group.num_tasks}",
        f"--ntasks-per-node={group.tasks_per_node}",
        f"--cpus-per-task={options.cpus_per_task}",
        *gpus.get(options.gpus, []),
    ]


def _own_address(config: Config, name: str) -> str:
    """Where the services listen: what the configuration says, or else Slurm's word."""
    if config.control.host is not None:
        return config.control.host
    interface = config.slurm.network_interface
    return interface_address(interface) if interface else own_ip(name)


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
