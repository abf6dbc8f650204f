"""Training-time test: what a micro-batch yields, and the acceptance estimate."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


# A named tuple, not a dataclass: FSDP2 finds tensors that need gradients only in tuples, lists
# and dictionaries of a root module's output on all torch versions that we support.
class TTTOutput(NamedTuple):
    """What one micro-batch contributes to an optimizer step.

    Attributes:
        loss: Scalar to call ``backward`` on, a share of the optimizer step's loss.
        loss_sums: [K] float64, loss summed over the trained predictions; detached.
        correct: [K] int64, scored predictions where the draft's choice is the target's.  One
            that is scored but not trained is a miss: the draft has no such token.
    """

    loss: Tensor
    loss_sums: Tensor
    correct: Tensor


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
