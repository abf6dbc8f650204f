"""What only the main rank may decide, and all ranks must know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from torchspec_hpc.training.parallel import World

Answer = TypeVar("Answer")


def ask_main(world: World, read: Callable[[], Answer]) -> Answer:
    """Has the main rank read something, and hands what it found to every rank.

    Files that change, ``checkpoints/latest`` for one, are read this way: NFS may show an older
    content of them to another node, and ranks that go on from different checkpoints hang.

    Args:
        world: The training group; every rank calls.
        read: Called on the main rank. If it raises, the other ranks fail here as that leaves.
    """
    answer: list[Answer | None] = [read() if world.is_main else None]
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    return cast("Answer", answer[0])
