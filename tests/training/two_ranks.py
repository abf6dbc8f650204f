"""Run by torchrun on two ranks: FSDP2 steps against plain autograd on all the data at once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from tests.training import tiny
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import BestCheckpoint
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta, Progress
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.eagle3.plan import make_plan, scored_targets
from torchspec_hpc.training.checkpoint import Checkpointer
from torchspec_hpc.training.main_rank import ask_main
from torchspec_hpc.training.optim import build_optimizer
from torchspec_hpc.training.parallel import World, gather_over_ranks, join, shard
from torchspec_hpc.training.step import Eagle3Step, step_weights

#: By rank: documents of each micro-batch. Rank 1's first one and rank 0's last one are empty.
SHARES = ([[0, 1], [2]], [[3], [4, 5]])
EMPTY = (2, 3)
NUM_STEPS = 3


def reference(config: TrainingConfig) -> tuple[dict[str, torch.Tensor], list[float]]:
    """One process, one batch, no accumulation."""
    draft = tiny.draft()
    optimizer = build_optimizer(draft, config)
    batch = tiny.batches([[i for share in SHARES for part in share for i in part]], EMPTY)[0]
    choices = tiny.head().argmax(batch.last[scored_targets(batch)])
    plan = make_plan(batch, config.ttt_length, draft.t2d[choices])
    norms = []
    for _ in range(NUM_STEPS):
        weights = torch.tensor(step_weights(config))
        output = draft(batch, tiny.head().rows(draft.kept_ids), plan, plan.trained, weights)
        output.loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(draft.parameters(), config.max_grad_norm)))
        optimizer.step()
        optimizer.zero_grad()
    return dict(draft.named_parameters()), norms


def full(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def check(config: TrainingConfig, world: World, run: RunDir) -> None:
    expected, norms = reference(config)
    draft = tiny.draft()
    shard(draft, world, config)
    optimizer = build_optimizer(draft, config)
    step = Eagle3Step(draft, tiny.head(), optimizer, world, config)
    mine = tiny.batches(SHARES[world.rank], EMPTY)
    results = [step(mine, flag=(world.rank == 1 and i == 1)) for i in range(NUM_STEPS)]
    assert [result.grad_norm for result in results] == pytest.approx(norms, rel=1e-4)
    assert [result.flagged for result in results] == [False, True, False]
    check_parameters(draft, expected)

    abandoned = step(mine if world.rank == 0 else None)  # one rank waited in vain
    assert abandoned.abandoned
    assert abandoned.flagged
    check_parameters(draft, expected)

    unchanged = {name: full(p).clone() for name, p in draft.named_parameters()}
    sums = gather_over_ranks(step.evaluate(mine)).sum(0)
    trained_on = gather_over_ranks(results[0].sums).sum(0)
    assert torch.equal(sums[2:], trained_on[2:])
    assert sums[0].sum() < trained_on[0].sum()
    check_parameters(draft, unchanged, exactly=True)

    checkpointer = save_twice(config, world, draft, optimizer, run)
    if world.is_main:
        torch.save(unchanged, run.root / "expected.pt")

    if world.rank == 1:
        mine[1].aux[:] = float("inf")  # hidden states that overflowed
    assert not step(mine).applied
    check_parameters(draft, unchanged, exactly=True)
    assert step(tiny.batches(SHARES[world.rank], EMPTY)).applied
    checkpointer.wait()
    load_what_the_main_rank_sees(world, checkpointer, run)
    check_parameters(draft, unchanged, exactly=True)


def save_twice(
    config: TrainingConfig,
    world: World,
    draft: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: RunDir,
) -> Checkpointer:
    """Saves at once, and again in the background, which may take as long as it likes."""
    progress = Progress(NUM_STEPS, 6 * NUM_STEPS, accept_len=2.0)
    made = []
    for directory, is_async in ((RunDir(run.root / "sync"), False), (run, True)):
        settings = config.model_copy(update={"async_checkpoint": is_async, "max_checkpoints": 1})
        made.append(
            Checkpointer(directory, world, draft, optimizer, tiny.meta(world.size), settings)
        )
        made[-1].save(progress)
    return made[-1]


def load_what_the_main_rank_sees(world: World, checkpointer: Checkpointer, run: RunDir) -> None:
    """On another node `latest`, `best` and meta.json may be older, or not there yet."""
    assert ask_main(world, lambda: world.rank) == 0

    def behind(*_: object) -> None:
        raise AssertionError("only the main rank may look")

    checkpointer.best_accept_len = float("-inf")
    with pytest.MonkeyPatch.context() as patch:
        if not world.is_main:
            patch.setattr(CheckpointMeta, "read", behind)
            patch.setattr(BestCheckpoint, "read", behind)
        found = checkpointer.load(run.checkpoints / f"step_{NUM_STEPS}")
    assert found == Progress(NUM_STEPS, 6 * NUM_STEPS, accept_len=2.0)
    assert checkpointer.best_accept_len == 2.0


def check_parameters(
    draft: nn.Module, expected: dict[str, torch.Tensor], exactly: bool = False
) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-4, "atol": 1e-5}
    for name, parameter in draft.named_parameters():
        torch.testing.assert_close(full(parameter), expected[name], **tolerance)


if __name__ == "__main__":
    made = tiny.training_config(max_grad_norm=1.0, weight_decay=0.1, learning_rate=1e-2)
    group = join(made)
    for strategy in ("full_shard", "replicate"):
        directory = RunDir(Path(sys.argv[1]) / strategy)
        if group.is_main:
            directory.create()
        dist.barrier()
        check(made.model_copy(update={"fsdp_strategy": strategy}), group, directory)
    dist.destroy_process_group()
