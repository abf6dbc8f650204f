"""Run by torchrun on any number of ranks: two steps on the same documents, cut in many ways."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.training import tiny
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.training.parallel import World, join, shard
from torchspec_hpc.training.step import Eagle3Step

NUM_DOCUMENTS = 12
#: Nothing in them is supervised.
EMPTY = (4, 9, 11)
NUM_STEPS = 2

#: By rank: documents of each micro-batch.
Cut = list[list[list[int]]]


def cuts(num_ranks: int) -> list[Cut]:
    """All documents in one pack if there is one rank; then random packs and accumulation steps."""
    chance = random.Random(num_ranks)  # the same on every rank
    supervised = [i for i in range(NUM_DOCUMENTS) if i not in EMPTY]
    if num_ranks == 1:
        made = [[[list(range(NUM_DOCUMENTS))]]]
    else:  # one rank has nothing to learn from, the others share the rest
        others = [supervised[i :: num_ranks - 1] for i in range(num_ranks - 1)]
        made = [[[documents] for documents in [*others, list(EMPTY)]]]
    for num_micro_batches in (1, 2, 3, 3):
        documents = chance.sample(range(NUM_DOCUMENTS), NUM_DOCUMENTS)
        num_packs = num_ranks * num_micro_batches
        ends = [0, *sorted(chance.sample(range(1, NUM_DOCUMENTS), num_packs - 1)), NUM_DOCUMENTS]
        packs = [documents[a:b] for a, b in pairwise(ends)]
        made.append([packs[rank::num_ranks] for rank in range(num_ranks)])
    return made


def train(cut: Cut, world: World, config: TrainingConfig) -> dict[str, torch.Tensor]:
    """Gradients as the parameters show them: gradient descent, no clipping."""
    draft = tiny.draft()
    shard(draft, world, config)
    optimizer = torch.optim.SGD([p for p in draft.parameters() if p.requires_grad], lr=0.1)
    step = Eagle3Step(draft, tiny.head(), optimizer, world, config)
    for _ in range(NUM_STEPS):
        assert step(tiny.batches(cut[world.rank], EMPTY)).applied
    return {
        name: p.detach().full_tensor() if isinstance(p, DTensor) else p.detach().clone()
        for name, p in draft.named_parameters()
    }


if __name__ == "__main__":
    made = tiny.training_config(max_grad_norm=1e9)
    group = join(made)
    results = [
        train(cut, group, made.model_copy(update={"fsdp_strategy": strategy}))
        for strategy in ("full_shard", "replicate")
        for cut in cuts(group.size)
    ]
    if group.is_main:
        torch.save(results, Path(sys.argv[1]) / f"{group.size}.pt")
    dist.destroy_process_group()
