"""Training-time test: which (step, position) pairs are supervised, the loss, the metrics.

Step ``i`` at position ``t`` has read ``x_0 .. x_{t+1+i}`` and predicts ``x_{t+2+i}``; its target is
the target model's distribution at position ``t+1+i``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.drafts.target_head import TargetHead


class Supervision(NamedTuple):
    """Which predictions count.

    Attributes:
        scored: [K, N] bool; step i at t is in the acceptance metrics: ``x_{t+2+i}`` exists in
            the document and its loss mask is set.
        trained: [K, N] bool; scored, and the target's own choice is in the draft's vocabulary.
    """

    scored: Tensor
    trained: Tensor


# A named tuple, not a dataclass: FSDP2 finds tensors that need gradients only in tuples, lists
# and dictionaries of a root module's output on all torch versions that we support.
class TTTOutput(NamedTuple):
    """What one micro-batch contributes to an optimizer step.

    Attributes:
        loss: Scalar to call ``backward`` on, a share of the optimizer step's loss.
        loss_sums: [K] float32, cross entropy summed over the trained positions; detached.
        correct: [K] int64, scored positions where the draft's choice is the target's.
        scored: [K] int64.
        trained: [K] int64.
    """

    loss: Tensor
    loss_sums: Tensor
    correct: Tensor
    scored: Tensor
    trained: Tensor


def supervision(
    batch: PackedBatch, argmax: Tensor, kept: Tensor | None, ttt_length: int
) -> Supervision:
    """Finds the supervised positions of every TTT step.

    Args:
        batch: The micro-batch.
        argmax: [N] int64, the target's choice at each position; see ``target_argmax``.
        kept: [V] bool, the draft's vocabulary; None if it is the target's.
        ttt_length: K.
    """
    index = torch.arange(batch.num_tokens, device=argmax.device)
    step = torch.arange(ttt_length, device=argmax.device)[:, None]
    exists = batch.tokens_left >= 2 + step  # [K, N]: t+2+i is in the document
    # where it is not, any index will do
    token = (index + 2 + step).clamp(max=batch.num_tokens - 1)
    scored = exists & batch.loss_mask[token]
    if kept is None:
        return Supervision(scored, scored)
    return Supervision(scored, scored & kept[argmax[token - 1]])


def scored_rows(batch: PackedBatch) -> Tensor:
    """[N] bool, positions whose target distribution some TTT step is compared with."""
    first = batch.position_ids == 0  # step 0 at t = 0 is compared with position 1
    return torch.roll(batch.loss_mask, -1) & (batch.tokens_left >= 1) & ~first


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Returns ``sum over rows of -sum_v P_v log softmax(logits)_v``, in float32 or better.

    Args:
        logits: [R, V].
        probabilities: [R, V], P.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), probabilities, reduction="sum")


class TargetDistributions:
    """The target's distributions over the draft's vocabulary, each computed once.

    Step i at t and step j at t+i-j are compared with the same distribution, that of position
    t+1+i, so all steps read one table.

    Args:
        head: The target's head.
        last: [N, H].
        trained: [K, N] bool.
        kept_ids: [V_draft]; None if not pruned.
    """

    def __init__(
        self, head: TargetHead, last: Tensor, trained: Tensor, kept_ids: Tensor | None
    ) -> None:
        needed = torch.zeros_like(trained[0])
        for step, positions in enumerate(trained):
            needed[positions.nonzero()[:, 0] + 1 + step] = True
        with torch.no_grad():
            self._table: Tensor = head(last[needed], kept_ids).softmax(dim=-1)
        self._row_of = needed.cumsum(0) - 1

    def at(self, positions: Tensor) -> Tensor:
        """[R, V_draft], distributions of the token that follows each of ``positions`` [R]."""
        return self._table.index_select(0, self._row_of[positions])


def accept_len(correct: Tensor, scored: Tensor) -> float:
    """Expected tokens per verification, counting the target's own bonus token.

    ``1 + sum_i prod_{j<=i} acc_j``: as vLLM, SGLang and the papers count it, and a training
    estimate: the served value is measured by the evaluation.

    Args:
        correct: [K], of the metrics of any number of micro-batches added up.
        scored: [K].
    """
    accuracy = correct.double() / scored.double().clamp(min=1)
    return 1.0 + float(accuracy.cumprod(0).sum())
