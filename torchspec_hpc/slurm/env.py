"""The job as Slurm describes it to its batch script: nodes of both groups, attempt, addresses.

Unsuffixed variables describe component 0, inside every group of a het job; what is said here
about such a group comes from its ``*_HET_GROUP_n`` variables (sbatch(1), "OUTPUT ENVIRONMENT
VARIABLES").
"""

from __future__ import annotations

import logging
import re
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError, TorchspecError
from torchspec_hpc.slurm.scheduler import NoSlurmClient, SchedulerError, insist, run_client
from torchspec_hpc.slurm.shape import inference_group, training_group

logger = logging.getLogger(__name__)

#: Het group that runs the engines, and whose first node runs the supervisor.
INFERENCE_GROUP = 0
#: Het group that runs the trainers.
TRAINING_GROUP = 1

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class SlurmEnvironmentError(TorchspecError):
    """The environment or Slurm does not say what every heterogeneous job is told."""


@dataclass(frozen=True)
class Nodes:
    """Node names of both groups, in Slurm's order; the same one where they share it."""

    inference: tuple[str, ...]
    training: tuple[str, ...]


def read_nodes(environ: Mapping[str, str], config: Config) -> Nodes:
    """Which nodes the job, whose batch script has this environment, has for which group.

    Raises:
        SlurmEnvironmentError: This is no batch script of such a job.
        ConfigError: The job has other numbers of nodes than the configuration asks for.
    """
    wanted = inference_group(config).num_nodes, training_group(config).num_nodes
    if config.slurm.topology == "het":
        return _read_het_nodes(environ, wanted)
    if "SLURM_HET_SIZE" in environ:
        raise ConfigError(
            f"slurm.topology is {config.slurm.topology}, and the job is heterogeneous",
            hint="remove the hetjob line from the script's header, or set slurm.topology=het",
        )
    nodes = expand_nodelist(_get(environ, "SLURM_JOB_NODELIST"))
    if config.slurm.topology == "one_node":
        _require_count("the job", len(nodes), 1, "slurm.topology = one_node")
        return Nodes(nodes, nodes)
    keys = "inference.inference_num_gpus and training.training_num_nodes"
    _require_count("the job", len(nodes), sum(wanted), keys)
    return Nodes(nodes[: wanted[0]], nodes[wanted[0] :])


def _read_het_nodes(environ: Mapping[str, str], wanted: tuple[int, int]) -> Nodes:
    size = environ.get("SLURM_HET_SIZE")
    if size is None:
        raise SlurmEnvironmentError(
            "SLURM_HET_SIZE is not set: this process is not the batch script of a heterogeneous "
            "job; for one allocation set slurm.topology to single or one_node"
        )
    keys = "inference.inference_num_gpus", "training.training_num_nodes"
    groups = []
    for index, (num_nodes, key) in enumerate(zip(wanted, keys, strict=True)):
        name = f"SLURM_JOB_NODELIST_HET_GROUP_{index}"
        nodes = expand_nodelist(_get(environ, name)) if index < int(size) else ()
        _require_count(f"component {index} of the job", len(nodes), num_nodes, key)
        groups.append(nodes)
    return Nodes(*groups)


def _require_count(what: str, found: int, wanted: int, key: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"{what} has {found} nodes, {key} asks for {wanted}",
            hint="change --nodes in the script's header, or the configuration",
        )


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
    Where the node has no ``scontrol``, names have to do.

    Raises:
        SchedulerError: No controller answers.
        SlurmEnvironmentError: ``scontrol`` fails or leaves a node out, or there is none and a
            name does not resolve.
    """
    wanted = list(nodes)
    try:
        done = insist(lambda: _show_nodes(wanted))
    except NoSlurmClient:
        logger.warning(
            "there is no scontrol on this node: addresses are what node names resolve to"
        )
        return {node: _resolve(node) for node in wanted}
    found = parse_addresses(done.stdout)
    if missing := sorted(set(wanted) - set(found)):
        said = [line for line in done.stdout.splitlines() if not line.startswith("NodeName=")]
        raise SlurmEnvironmentError(
            f"scontrol show node gives no address of {', '.join(missing)}: "
            + "; ".join([*said, *done.stderr.splitlines()])
        )
    return {node: found[node] for node in wanted}


def parse_addresses(output: str) -> dict[str, str]:
    """Node name -> address of what ``scontrol show node --oneliner`` prints."""
    return dict(re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", output, re.MULTILINE))


def _resolve(node: str) -> str:
    try:
        return str(socket.getaddrinfo(node, None, proto=socket.IPPROTO_TCP)[0][4][0])
    except OSError as error:
        raise SlurmEnvironmentError(
            f"node {node} has no address: there is no scontrol on this node, and its name does not "
            f"resolve: {error}"
        ) from error


def _show_nodes(nodes: list[str]) -> subprocess.CompletedProcess[str]:
    done = run_client(["scontrol", "show", "node", "--oneliner", ",".join(nodes)])
    if done.returncode and not done.stdout:  # a node that it does not know is named there
        raise SchedulerError(f"scontrol show node failed: {done.stderr.strip()}")
    return done


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
