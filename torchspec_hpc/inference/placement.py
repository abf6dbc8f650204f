"""Which engine a rank belongs to, and which devices it may use.

One process is one engine, or one node of an engine that spans several.  A *device slot* is
one GPU where there are GPUs and one process otherwise, so on CPUs the settings only count
engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """Where one rank works.

    Attributes:
        engine: Counts from 0.
        node: Of the engine's nodes, counts from 0; the first one takes requests.
        num_nodes: That the engine spans.
        devices: Device slots on the rank's node.
    """

    engine: int
    node: int
    num_nodes: int
    devices: tuple[int, ...]


def place(inference: InferenceConfig, rank: int, num_ranks: int) -> Placement:
    """Where a rank works.

    Ranks fill the nodes one after the other, as ``srun --distribution=block`` does.

    Raises:
        ConfigError: The number of ranks is not what the settings need.
    """
    per_engine, num_nodes = inference.inference_num_gpus_per_engine, inference.nodes_per_engine
    if num_ranks != inference.num_ranks:
        raise ConfigError(
            f"the inference group has {num_ranks} ranks for {inference.num_engines} engines of "
            f"{num_nodes} nodes each (inference_num_gpus = {inference.inference_num_gpus}, "
            f"inference_num_gpus_per_engine = {per_engine}, "
            f"inference_num_gpus_per_node = {inference.inference_num_gpus_per_node})",
            hint="start one task for each node of each engine",
        )
    num_devices, local = per_engine // num_nodes, rank % inference.ranks_per_node
    devices = tuple(range(local * num_devices, (local + 1) * num_devices))
    return Placement(rank // num_nodes, rank % num_nodes, num_nodes, devices)


def visible_devices(devices: tuple[int, ...], current: str | None) -> str:
    """The value of ``CUDA_VISIBLE_DEVICES`` for one engine.

    Args:
        devices: Device slots of the engine on its node.
        current: The value that the process was started with; ``None``: not set.

    Raises:
        ConfigError: Fewer devices are visible than the engine needs.
    """
    if current is None:
        return ",".join(str(device) for device in devices)
    names = [name for name in current.split(",") if name]
    if len(names) > devices[-1]:
        return ",".join(names[device] for device in devices)
    if len(names) == len(devices):  # the task was given its own devices and no others
        return current
    raise ConfigError(
        f"an engine needs the devices {devices} of its node and CUDA_VISIBLE_DEVICES is "
        f"{current!r}",
        allowed="every GPU of the node, or exactly the engine's own",
        hint="check inference_num_gpus_per_node and what the job was given",
    )
