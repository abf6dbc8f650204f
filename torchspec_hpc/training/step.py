"""One optimizer step of EAGLE-3 over all micro-batches and ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.batch import PackedBatch, upload
from torchspec_hpc.drafts.eagle3.flops import step_flops
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.eagle3.plan import TTTPlan, make_plan, scored_targets
from torchspec_hpc.drafts.eagle3.ttt import TTTOutput
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.training.parallel import World, sum_over_ranks


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        sums: ``[4, K]`` float64, of this rank: cross entropy, correct, scored and trained
            positions by TTT step.
        grad_norm: L2 norm of the whole gradient before clipping.
        applied: False if the gradient was not finite and the parameters stayed.
        flagged: Whether any rank raised its flag in this step.
        abandoned: A rank had no data, so nothing was done on any.
        flops: Of this rank's forward and backward passes, by formula.
        rows_computed: Rows that the TTT steps computed, of this rank.
        rows_total: Rows there would have been without leaving any out, K times the tokens.
        compute_s: Seconds of forward, backward and gradient norm.
        optimizer_s: Seconds of the update.
    """

    sums: Tensor
    grad_norm: float
    applied: bool
    flagged: bool
    abandoned: bool = False
    flops: float = 0.0
    rows_computed: int = 0
    rows_total: int = 0
    compute_s: float = 0.0
    optimizer_s: float = 0.0


def step_weights(config: TrainingConfig) -> list[float]:
    """Weight of the loss of each TTT step, K of them."""
    return [config.ttt_loss_decay**step for step in range(config.ttt_length)]


class Eagle3Step:
    """Forward, backward and update, token-weighted over the whole optimizer step.

    The gradient is that of ``sum_i w_i * loss_i / (trained predictions of step i)`` with
    the predictions counted over all micro-batches of all ranks, so it does not
    depend on how samples were cut into micro-batches or spread over ranks.

    Args:
        draft: Sharded by :func:`torchspec_hpc.training.parallel.shard`.
        head: The target's norm and head, on the device.
        optimizer: Over the draft's parameters.
        world: The training group.
        config: TTT, precision and clipping.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        head: TargetHead,
        optimizer: torch.optim.Optimizer,
        world: World,
        config: TrainingConfig,
    ) -> None:
        assert isinstance(draft, FSDPModule)
        self._draft, self._sharded = draft, draft
        self._head, self._optimizer, self._world = head, optimizer, world
        self._draft_head = head.rows(draft.kept_ids)
        self._trains_head = draft.lm_head.weight.requires_grad
        self._dtype = getattr(torch, config.compute_dtype)
        self._ttt_length, self._max_grad_norm = config.ttt_length, config.max_grad_norm
        self._weights = torch.tensor(step_weights(config), device=world.device)

    def __call__(self, batches: Sequence[PackedBatch] | None, flag: bool = False) -> StepResult:
        """Trains on one optimizer step's micro-batches of this rank.

        Args:
            batches: On the CPU, as many on every rank; None: this rank gave up waiting for
                them, and all ranks abandon the step.
            flag: Any rank's flag becomes every rank's ``flagged``; it rides an all-reduce.
        """
        start = time.monotonic()
        # the device holds the hidden states of one micro-batch at a time
        only = self._on_device(batches[0]) if batches and len(batches) == 1 else None
        plans = [self._plan(batch, (only or batch).last) for batch in batches or ()]
        trained = [torch.zeros(self._ttt_length, dtype=torch.int64), *(p.trained for p in plans)]
        mine = torch.cat([torch.stack(trained).sum(0), torch.tensor([flag, batches is None])])
        shared = sum_over_ranks(upload(mine, self._world.device))
        num_trained, (flagged, abandoned) = shared[:-2], (shared[-2:] > 0).tolist()
        if abandoned or batches is None:
            nothing = _with_counts(self._zeros(), [])
            return StepResult(nothing, 0.0, applied=False, flagged=True, abandoned=True)
        found = self._zeros()
        for index, (batch, plan) in enumerate(zip(batches, plans, strict=True)):
            is_last = index == len(batches) - 1
            self._sharded.set_requires_gradient_sync(is_last)
            self._sharded.set_reshard_after_backward(is_last)  # else gathered for each anew
            output = self._forward(only or self._on_device(batch), plan, num_trained)
            # FSDP averages gradients over ranks; the loss is a sum over them
            (output.loss * self._world.size).backward()  # type: ignore[no-untyped-call]
            found += torch.stack([output.loss_sums, output.correct.double()])
        grad_norm = self._clip()
        computed = time.monotonic()
        applied = grad_norm < float("inf")  # False for nan too
        if applied:
            self._optimizer.step()
        self._optimizer.zero_grad()
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()  # what the update takes is its own time, not the next step's
        return StepResult(
            _with_counts(found, plans),
            grad_norm,
            applied,
            flagged,
            flops=sum(step_flops(self._draft.config, plan, self._trains_head) for plan in plans),
            rows_computed=sum(plan.num_states for plan in plans),
            rows_total=self._ttt_length * sum(batch.num_tokens for batch in batches),
            compute_s=computed - start,
            optimizer_s=time.monotonic() - computed,
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[PackedBatch]) -> Tensor:
        """Measures the draft without changing it.

        Args:
            batches: On the CPU, as many on every rank.

        Returns:
            ``[4, K]`` float64, of this rank; see :class:`StepResult`.
        """
        found, plans = self._zeros(), []
        for batch in batches:
            moved = self._on_device(batch)
            plan = self._plan(batch, moved.last)
            # each micro-batch's own mean: only the sums are looked at
            output = self._forward(moved, plan, upload(plan.trained, found.device))
            found += torch.stack([output.loss_sums, output.correct.double()])
            plans.append(plan)
        self._sharded.reshard()  # the last forward left the parameters whole
        return _with_counts(found, plans)

    def _on_device(self, batch: PackedBatch) -> PackedBatch:
        return batch.to(self._world.device, self._dtype)

    def _forward(self, batch: PackedBatch, plan: TTTPlan, num_trained: Tensor) -> TTTOutput:
        output: TTTOutput = self._draft(batch, self._draft_head, plan, num_trained, self._weights)
        return output

    def _plan(self, batch: PackedBatch, last: Tensor) -> TTTPlan:
        """Which predictions count; for a pruned vocabulary that takes the target's choices.

        Args:
            batch: On the CPU.
            last: Its outputs of the target's last layer, wherever they are.
        """
        kept = self._draft.t2d
        if kept is None:
            return make_plan(batch, self._ttt_length)
        # all of them, pinned: gathering on the CPU would take longer than the copy
        last = last.to(self._world.device, self._dtype, non_blocking=True)
        scored = upload(scored_targets(batch), last.device)
        choices = self._head.argmax(last.index_select(0, scored))
        return make_plan(batch, self._ttt_length, kept[choices].cpu())

    def _zeros(self) -> Tensor:
        """[2, K], for losses and correct predictions."""
        return torch.zeros(2, len(self._weights), dtype=torch.float64, device=self._world.device)

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self._draft.parameters(), self._max_grad_norm)
        assert isinstance(norm, DTensor)
        return float(norm.full_tensor())  # over the shards of all ranks


def _with_counts(found: Tensor, plans: Sequence[TTTPlan]) -> Tensor:
    """[4, K]: losses and correct predictions [2, K], then the scored and the trained ones."""
    counts = torch.zeros_like(found, device="cpu")
    for plan in plans:
        counts += torch.stack([plan.scored, plan.trained])
    return torch.cat([found, upload(counts, found.device)])
