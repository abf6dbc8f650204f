"""The target's final norm and head: hidden states to the target's distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec_hpc.drafts.norm import rms_norm

#: Bytes of logits in float32 that a matrix product may make at once.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 2**30}
_BLOCK = 64


def row_argmax(x: Tensor) -> Tensor:
    """``x.argmax(-1)``, the first of equals; on CPUs several times faster.

    There, a reduction that keeps track of an index is not vectorised.  So find the block with the
    largest value first.
    """
    if x.device.type != "cpu" or x.shape[-1] % _BLOCK or not x.numel():
        return x.argmax(-1)
    blocks = x.view(*x.shape[:-1], -1, _BLOCK)
    which = blocks.amax(-1).argmax(-1)
    block = blocks.gather(-2, which[..., None, None].expand(*which.shape, 1, _BLOCK))
    found: Tensor = which * _BLOCK + block[..., 0, :].argmax(-1)
    return found


class TargetHead(nn.Module):
    """``lm_head(norm(y))``, frozen.

    Args:
        norm: [H], weight of the target's final RMSNorm.
        lm_head: [V, H].
        eps: Of the norm.
    """

    norm: Tensor
    lm_head: Tensor

    def __init__(self, norm: Tensor, lm_head: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("norm", norm.detach(), persistent=False)
        self.register_buffer("lm_head", lm_head.detach(), persistent=False)
        self.eps = eps

    def rows(self, kept_ids: Tensor | None) -> TargetHead:
        """The head of a pruned vocabulary.

        Args:
            kept_ids: Ids to compute logits for; None: all, which is this head itself.
        """
        if kept_ids is None:
            return self
        return TargetHead(self.norm, self.lm_head.index_select(0, kept_ids), self.eps)

    @torch.no_grad()
    def logits(self, y: Tensor) -> Tensor:
        """Returns the target's logits [n, V] in the head's type.

        Args:
            y: [n, H], output of the last layer before the final norm.
        """
        return F.linear(rms_norm(y, self.norm, self.eps).to(self.lm_head.dtype), self.lm_head)

    def argmax(self, y: Tensor) -> Tensor:
        """Returns the most probable next tokens, [n] int64.

        Args:
            y: [n, H], as for :meth:`logits`.  The head costs as much as several layers of a
                draft: leave out what nobody reads.
        """
        chunk = max(1, CHUNK_BYTES[y.device.type] // (4 * self.lm_head.shape[0]))
        return torch.cat([row_argmax(self.logits(part)) for part in torch.split(y, chunk)])
