"""Training-time test: which rows a step computes, and what they are compared with.

TTT step ``i`` at position ``t`` has read ``x_0 .. x_{t+1+i}`` and predicts ``x_{t+2+i}``; its
target is the target model's distribution at position ``t+1+i``.  Seen from there: a *target
position* ``j`` teaches step ``i`` at ``t = j-1-i``, for every ``i`` at once, as long as ``t`` is in
the document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_hpc.drafts.batch import PackedBatch


@dataclass(frozen=True)
class StepRows:
    """The rows of a packed batch that one TTT step computes.

    All on the CPU, so that nobody has to wait for a device to learn a shape.

    Attributes:
        index: [R] int64, positions in the packed row.
        order: [R] int64, sorts ``index`` ascending.
        bounds: [D+1], where the documents begin among the sorted rows.
        cu_seqlens: [D+1] int64, where they begin in the packed row, and N.
    """

    index: Tensor
    order: Tensor
    bounds: list[int]
    cu_seqlens: Tensor

    @property
    def num_scores(self) -> int:
        """Pairs of a row and a key of block 0 that it reads: those up to itself."""
        starts = self.cu_seqlens[:-1].repeat_interleave(torch.tensor(self.bounds).diff())
        return int((self.index[self.order] - starts + 1).sum())


@dataclass(frozen=True)
class TTTPlan:
    """All index arithmetic of the unrolled forward pass of one micro-batch; CPU tensors.

    From step 1 on, a row's state is read by nobody but the same row in later steps.  So step i
    computes only the rows that some step >= i trains, and rows that are trained longest come
    first: those of step i are the first ``steps[i]`` of ``rows``, views of step 0's.

    Attributes:
        rows: [R] int64, positions that any step computes.
        steps: For each of the K TTT steps the rows it computes.
        targets: [n] int64, ascending target positions whose choice the draft can say.
        pairs: [K, n] int64, where step i's prediction of a target is, among the rows of all steps
            one after the other; ``num_states`` where there is none.
        scored: [K] int64, predictions that the acceptance metrics count.
        trained: [K] int64, predictions that the loss counts: scored, and the target's own choice
            is in the draft's vocabulary.
    """

    rows: Tensor
    steps: Sequence[StepRows]
    targets: Tensor
    pairs: Tensor
    scored: Tensor
    trained: Tensor

    @property
    def num_states(self) -> int:
        """Rows of all TTT steps together."""
        return sum(len(step.index) for step in self.steps)

    @property
    def num_scores(self) -> int:
        """Pairs of a row and a key of block 0 that it reads, of all TTT steps."""
        return sum(step.num_scores for step in self.steps)


def scored_targets(batch: PackedBatch) -> Tensor:
    """[n] int64, ascending positions whose target distribution some TTT step is compared with.

    The token behind such a position exists in its document and has its loss mask set.  Nothing
    comes before the first position of a document, so step 0 has no row for it.
    """
    behind = torch.roll(batch.loss_mask, -1)
    return (behind & (batch.tokens_left >= 1) & (batch.position_ids >= 1)).nonzero()[:, 0]


def make_plan(batch: PackedBatch, ttt_length: int, kept: Tensor | None = None) -> TTTPlan:
    """Plans a micro-batch.

    Args:
        batch: On the CPU; hidden states are not looked at.
        ttt_length: K.
        kept: [n] bool, whether the target's choice at each of :func:`scored_targets` is in the
            draft's vocabulary; None: it always is.
    """
    scored = scored_targets(batch)
    targets = scored if kept is None else scored[kept]
    positions = batch.position_ids
    num_steps = torch.arange(ttt_length)[:, None] < positions[targets]  # [K, n]: t is there

    # the last step that trains each row; later steps overwrite earlier ones
    last_step = torch.full((batch.num_tokens,), -1)
    for step in range(ttt_length):
        last_step[targets[num_steps[step]] - 1 - step] = step
    rows = torch.argsort(last_step, descending=True, stable=True)[: int((last_step >= 0).sum())]

    counts = [int((last_step >= step).sum()) for step in range(ttt_length)]
    row_of = torch.zeros(batch.num_tokens, dtype=torch.int64)
    row_of[rows] = torch.arange(len(rows))
    first = torch.tensor([0, *counts]).cumsum(0)  # of each step among the states of all
    earlier = targets - 1 - torch.arange(ttt_length)[:, None]
    pairs = torch.where(num_steps, first[:-1, None] + row_of[earlier.clamp(min=0)], first[-1])

    ascending = torch.argsort(rows)
    steps = [_step_rows(rows[:n], ascending[ascending < n], batch.cu_seqlens) for n in counts]
    return TTTPlan(
        rows=rows,
        steps=steps,
        targets=targets,
        pairs=pairs,
        scored=_count(positions[scored], ttt_length),
        trained=num_steps.sum(1),
    )


def _step_rows(index: Tensor, order: Tensor, cu_seqlens: Tensor) -> StepRows:
    bounds = torch.searchsorted(index[order], cu_seqlens).tolist()
    return StepRows(index, order, bounds, cu_seqlens)


def _count(positions: Tensor, ttt_length: int) -> Tensor:
    """[K], targets at ``positions`` of their documents that step i has a row for."""
    return (torch.arange(ttt_length)[:, None] < positions).sum(1)
