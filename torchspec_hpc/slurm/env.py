"""The job as Slurm describes it to its batch script: het groups, attempt, addresses.

Unsuffixed variables describe component 0, inside every group; what is said here about a
group comes from its ``*_HET_GROUP_n`` variables (sbatch(1), "OUTPUT ENVIRONMENT VARIABLES").
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.slurm.scheduler import SchedulerError, insist, run_client

#: Het group that runs the engines, and whose first node runs the supervisor.
INFERENCE_GROUP = 0
#: Het group that runs the trainers.
TRAINING_GROUP = 1

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class SlurmEnvironmentError(TorchspecError):
    """The environment or Slurm does not say what every heterogeneous job is told."""


@dataclass(frozen=True)
class HetGroup:
    """One component of the job.

    Attributes:
        index: Number of the component, as in ``srun --het-group=index``.
        job_id: Its own job id; the leader's plus `index`.
        partition: Where it runs.
        nodes: Node names in Slurm's order.
    """

    index: int
    job_id: int
    partition: str
    nodes: tuple[str, ...]

    @property
    def num_nodes(self) -> int:
        """Nodes of this component."""
        return len(self.nodes)


def read_het_groups(environ: Mapping[str, str]) -> list[HetGroup]:
    """All components of the job whose batch script has this environment.

    Raises:
        SlurmEnvironmentError: This is no batch script of a heterogeneous job.
    """
    size = environ.get("SLURM_HET_SIZE")
    if size is None:
        raise SlurmEnvironmentError(
            "SLURM_HET_SIZE is not set: this process is not the batch script of a heterogeneous job"
        )
    return [_read_group(environ, index) for index in range(int(size))]


def job_id(environ: Mapping[str, str]) -> str:
    """Id of the job; of a het job that of its leader, in every group."""
    return _get(environ, "SLURM_JOB_ID")


def attempt(environ: Mapping[str, str]) -> int:
    """How often this job was requeued; Slurm sets no variable the first time."""
    return int(environ.get("SLURM_RESTART_COUNT", "0"))


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Node names of a host list expression such as ``n[1-3,07],login``.

    Raises:
        SlurmEnvironmentError: The expression has unbalanced or malformed brackets.
    """
    names: list[str] = []
    for item in re.split(r",(?![^\[]*\])", nodelist):
        expanded = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", item):
            parts = [literal] if literal else _expand_ranges(ranges, nodelist)
            expanded = [name + part for name in expanded for part in parts]
        if not expanded[0] or item.count("[") != item.count("]"):
            raise SlurmEnvironmentError(f"{nodelist!r} is no list of nodes")
        names += expanded
    return tuple(names)


def node_addresses(nodes: Iterable[str]) -> dict[str, str]:
    """Address of every node as Slurm itself reaches it (``NodeAddr``).

    Node names need not resolve, and where they do they may name another interface.
    One ``scontrol`` call, whatever the number of nodes, again while no controller answers.

    Raises:
        SchedulerError: No controller answers.
        SlurmEnvironmentError: ``scontrol`` fails or leaves a node out.
    """
    wanted = list(nodes)
    done = insist(lambda: _show_nodes(wanted))
    found = dict(re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", done.stdout, re.MULTILINE))
    if missing := sorted(set(wanted) - set(found)):
        said = [line for line in done.stdout.splitlines() if not line.startswith("NodeName=")]
        raise SlurmEnvironmentError(
            f"scontrol show node gives no address of {', '.join(missing)}: "
            + "; ".join([*said, *done.stderr.splitlines()])
        )
    return {node: found[node] for node in wanted}


def _show_nodes(nodes: list[str]) -> subprocess.CompletedProcess[str]:
    done = run_client(["scontrol", "show", "node", "--oneliner", ",".join(nodes)])
    if done.returncode and not done.stdout:  # a node that it does not know is named there
        raise SchedulerError(f"scontrol show node failed: {done.stderr.strip()}")
    return done


def _read_group(environ: Mapping[str, str], index: int) -> HetGroup:
    suffix = f"_HET_GROUP_{index}"
    return HetGroup(
        index=index,
        job_id=int(_get(environ, f"SLURM_JOB_ID{suffix}")),
        partition=_get(environ, f"SLURM_JOB_PARTITION{suffix}"),
        nodes=expand_nodelist(_get(environ, f"SLURM_JOB_NODELIST{suffix}")),
    )


def _get(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise SlurmEnvironmentError(f"{name} is not set: is this a job of Slurm 20.11 or later?")
    return value


def _expand_ranges(ranges: str, nodelist: str) -> list[str]:
    """``"8-10,3"`` is 8, 9, 10, 3; leading zeros give the width, as in ``08-10``."""
    numbers = []
    for part in ranges.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise SlurmEnvironmentError(f"{nodelist!r} is no list of nodes: {part!r} is no range")
        first, last = match[1], match[2] or match[1]
        numbers += [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return numbers
