"""FlexAttention of some rows over all keys of their documents (GPUs: it has no CPU backward)."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspec_hpc.drafts.batch import upload

if TYPE_CHECKING:
    from torchspec_hpc.drafts.eagle3.attention import Layout

#: Narrower heads do not fill the matrix units that its kernels use.
FLEX_MIN_HEAD_DIM = 16


def flex_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Causal attention within documents, compiled.

    Returns:
        Output [R, heads, head_dim] and log-sum-exp [R, heads] in float32, both differentiable.
    """
    attend, make_mask = _compiled()
    rows, ends = layout.positions, upload(layout.rows.cu_seqlens[1:], q.device)
    document_of_key = torch.searchsorted(ends, torch.arange(len(k), device=q.device), right=True)
    document_of_row = document_of_key[rows]

    def reads(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (document_of_row[row] == document_of_key[key]) & (key <= rows[row])

    mask = make_mask(reads, None, None, len(q), len(k), device=q.device)
    out, lse = attend(
        *(x.transpose(0, 1)[None] for x in (q, k, v)),
        block_mask=mask,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=True,
    )
    return out[0].transpose(0, 1), lse[0].T


@cache
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention import flex_attention as flex  # needs triton where it is used

    return (
        torch.compile(flex.flex_attention, dynamic=True),
        torch.compile(flex.create_block_mask, dynamic=True),
    )
