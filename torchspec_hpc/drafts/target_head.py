"""The target's final norm and head: hidden states to the target's distribution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec_hpc.drafts.norm import rms_norm

#: Rows per matrix product where all rows' logits at once would be too large.
ROWS_PER_CHUNK = 1024


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

    def forward(self, y: Tensor, kept_ids: Tensor | None = None) -> Tensor:
        """Returns the target's logits.

        Args:
            y: [N, H], output of the last layer before the final norm.
            kept_ids: Ids to compute logits for; None: all.

        Returns:
            [N, V] or [N, len(kept_ids)], float32 (float64 if the head is).
        """
        rows = self.lm_head if kept_ids is None else self.lm_head.index_select(0, kept_ids)
        logits = F.linear(rms_norm(y, self.norm, self.eps).to(rows.dtype), rows)
        return logits.to(torch.promote_types(rows.dtype, torch.float32))


@torch.no_grad()
def target_argmax(head: TargetHead, last: Tensor, needed: Tensor | None = None) -> Tensor:
    """Returns the target's most probable next token at each position.

    Args:
        head: The target's head.
        last: [N, H], pre-norm output of the last layer.
        needed: [N] bool, rows to compute; None: all. The head costs as much as several
            layers, so leave out what nobody reads: see ``scored_rows``.

    Returns:
        [N] int64 over the full vocabulary; 0 in rows that are not needed.
    """
    argmax = torch.zeros(last.shape[0], dtype=torch.int64, device=last.device)
    rows = torch.ones_like(argmax) if needed is None else needed
    for chunk in torch.split(rows.nonzero()[:, 0], ROWS_PER_CHUNK):
        argmax[chunk] = head(last.index_select(0, chunk)).argmax(-1)
    return argmax
