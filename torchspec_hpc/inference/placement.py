"""Which engine a rank is, and which devices it may use.

One process is one engine.  A *device slot* is one GPU where there are GPUs and one
process otherwise, so on CPUs the settings only count engines.
"""

from __future__ import annotations

from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.errors import ConfigError


def place(inference: InferenceConfig, rank: int, num_ranks: int) -> tuple[int, ...]:
    """Device slots of one rank on its node.

    Ranks fill the nodes one after the other, as ``srun`` does by default.

    Raises:
        ConfigError: The number of ranks is not the number of engines.
    """
    per_engine = inference.inference_num_gpus_per_engine
    if num_ranks != inference.num_engines:
        raise ConfigError(
            f"the inference group has {num_ranks} ranks for {inference.num_engines} engines "
            f"(inference_num_gpus = {inference.inference_num_gpus}, "
            f"inference_num_gpus_per_engine = {per_engine})",
            hint="start one task for each engine",
        )
    local = rank % inference.engines_per_node
    return tuple(range(local * per_engine, (local + 1) * per_engine))


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
