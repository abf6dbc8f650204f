"""The ranks of the training group: who we are, what we share, how the draft is sharded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.errors import ConfigError, UserError


@dataclass(frozen=True)
class World:
    """This process's place in the training group.

    Attributes:
        rank: Global rank.
        size: Number of ranks.
        device: Where this rank computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0


def rank_from_environment() -> int:
    """The global rank that torchrun gave this process.

    Raises:
        UserError: The process was not started by torchrun.
    """
    return _torchrun("RANK")


def join(config: TrainingConfig) -> World:
    """Joins the process group: NCCL on GPUs, gloo on CPUs.

    Raises:
        UserError: The process was not started by torchrun.
        ConfigError: The device does not exist.
    """
    rank, size, local_rank = (_torchrun(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = choose_device(config, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        # checkpoints and barriers of host data go over gloo
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timedelta(minutes=config.distributed_timeout_minutes),
    )
    return World(rank, size, device)


def choose_device(config: TrainingConfig, local_rank: int) -> torch.device:
    """The device of a local rank.

    Raises:
        ConfigError: There is no such device.
    """
    num_gpus = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise ConfigError(
            f"trainer with local rank {local_rank} has no GPU: this node shows {num_gpus}",
            allowed=f"training.training_num_gpus_per_node up to {num_gpus}",
            hint="ask Slurm for more GPUs per node, or set training.device to cpu",
        )
    return torch.device("cuda", local_rank)


def shard(draft: nn.Module, world: World, config: TrainingConfig) -> FSDPModule:
    """Shards parameters, gradients and optimizer state over all ranks, in place.

    The parameters stay in float32, the master weights; matrix products run in
    ``compute_dtype``.  ``replicate`` is the same with shards of the whole:
    only gradients travel.

    Args:
        draft: On the rank's device, equal on every rank.
        world: The training group.
        config: Strategy and precision.

    Returns:
        The same module, with FSDP2's methods.
    """
    if config.fsdp_strategy == "full_shard":
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(
            world.device.type, (world.size, 1), mesh_dim_names=("replicate", "shard")
        )
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, config.compute_dtype),
        reduce_dtype=getattr(torch, config.fsdp_reduce_dtype),
        cast_forward_inputs=False,  # counts and loss weights are inputs too and stay exact
    )
    fully_shard(draft, mesh=mesh, mp_policy=policy)
    assert isinstance(draft, FSDPModule)
    return draft


def seed_rank(seed: int, step: int, rank: int) -> None:
    """Starts this rank's own stream of random numbers, the same whenever it is started."""
    torch.manual_seed(hash((seed, step, rank)))  # of numbers: the same in every process


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sums a small tensor over all ranks, in place."""
    dist.all_reduce(values)
    return values


def gather_over_ranks(values: Tensor) -> Tensor:
    """Gathers a small tensor `[...]` of every rank as `[world size, ...]`."""
    rows = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, values)
    return torch.stack(rows)


def _torchrun(name: str) -> int:
    value = os.environ.get(name)
    if value is None:
        raise UserError(
            f"the environment variable {name} is not set",
            hint="start trainers with torchrun: torchrun ... -m torchspec_hpc.training.worker",
        )
    return int(value)
