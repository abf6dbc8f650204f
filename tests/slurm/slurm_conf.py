"""The configuration of a test cluster: small, quick, without root."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """What the cluster looks like.

    Attributes:
        partitions: Partition name to number of nodes; nodes are called ``<partition><i>``.
        cpus: Per node, whatever the machine has.
        memory_mb: Per node, likewise.
        gpus: Fake GPUs per node, one or more (``/dev/null`` under another name).
        isolated_network: One network and UTS namespace per node. Needs root.
        options: Further lines of slurm.conf; they replace ours of the same name.
    """

    partitions: Mapping[str, int] = field(default_factory=lambda: {"infer": 2, "train": 2})
    cpus: int = 16
    memory_mb: int = 16000
    gpus: int = 4
    isolated_network: bool = False
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[str]:
        return [f"{name}{i}" for name, num in self.partitions.items() for i in range(num)]


def slurm_conf(
    root: Path, layout: Layout, head: str, addresses: Mapping[str, str], *, own_hosts: bool
) -> str:
    """Text of slurm.conf.

    Args:
        root: Directory of the cluster.
        layout: Its shape.
        head: Address of the controller.
        addresses: Node name to address.
        own_hosts: Whether each node has a host name of its own, equal to its node name.
    """
    host = socket.gethostname()
    user = subprocess.check_output(["id", "-un"], text=True).strip()
    controller_port, *node_ports = _free_ports(1 + len(addresses))
    options = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}({head})",
        "SlurmctldPort": str(controller_port),
        "SlurmUser": user,
        "SlurmdUser": user,
        "StateSaveLocation": f"{root}/state",
        "SlurmdSpoolDir": f"{root}/spool/%n",
        "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
        "SlurmdPidFile": f"{root}/run/slurmd-%n.pid",
        "SlurmctldLogFile": f"{root}/log/slurmctld.log",
        "SlurmdLogFile": f"{root}/log/slurmd-%n.log",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # a requeued job waits for cred_expire; less than 5 is silently replaced by 120
        "AuthInfo": f"socket={root}/run/munge.sock,cred_expire=5",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "SchedulerType": "sched/backfill",
        # het jobs are started by the backfill scheduler only, by default every 30 s
        "SchedulerParameters": "bf_interval=1,bf_continue,sched_interval=5,"
        "sched_min_interval=0,batch_sched_delay=0",
        "SlurmdParameters": "config_overrides",  # believe CPUs and RealMemory below
        "PropagateResourceLimits": "NONE",
        "GresTypes": "gpu",
        "ReturnToService": "2",
        "KillWait": "2",  # seconds from SIGTERM to SIGKILL
        # nodes are pinged every third of it, and without such an event the backfill
        # scheduler does not look at a requeued job whose waiting time is over
        "SlurmdTimeout": "30",
        "MinJobAge": "3600",  # tests look at jobs after their end
        "MailProg": "/bin/true",
        **layout.options,
    }
    lines = [f"{key}={value}" for key, value in options.items()]
    for (node, address), port in zip(addresses.items(), node_ports, strict=True):
        own_host = node if own_hosts else host
        lines.append(
            f"NodeName={node} NodeHostname={own_host} NodeAddr={address} Port={port} "
            f"CPUs={layout.cpus} RealMemory={layout.memory_mb} Gres=gpu:{layout.gpus}"
        )
    for name, num in layout.partitions.items():
        nodes = ",".join(f"{name}{i}" for i in range(num))
        lines.append(f"PartitionName={name} Nodes={nodes} MaxTime=INFINITE DefMemPerCPU=100")
    lines[-len(layout.partitions)] += " Default=YES"
    return "\n".join(lines) + "\n"


def _free_ports(num: int) -> list[int]:
    """Distinct TCP ports that were free a moment ago."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
