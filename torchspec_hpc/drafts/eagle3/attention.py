"""Attention of the training-time test, in its plain form.

In TTT step i the query at position t reads the keys of block 0 (step 0) at positions s <= t of
its own document, and its own position's keys of blocks 1..i: what the draft would have
in its cache after drafting i tokens behind t (https://arxiv.org/abs/2503.01840, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]


def ttt_attention(
    queries: Tensor,
    rows: Tensor,
    block0: KeyValue,
    own: Sequence[KeyValue],
    cu_seqlens: Tensor,
) -> Tensor:
    """Attends document by document, so that no score crosses a document's end.

    Args:
        queries: [R, heads, head_dim], of the R positions that this step computes.
        rows: [R], their indices in the packed row, ascending.
        block0: Keys and values [N, kv_heads, head_dim] of step 0, for every position.
        own: Keys and values [R, kv_heads, head_dim] of steps 1..i, at the R positions.
        cu_seqlens: [D+1], starts of the documents and N.

    Returns:
        [R, heads * head_dim].
    """
    starts = cu_seqlens.tolist()
    bounds = torch.searchsorted(rows, cu_seqlens).tolist()  # the documents' parts of the R rows
    outputs = []
    for document in range(len(starts) - 1):
        here = slice(bounds[document], bounds[document + 1])
        there = slice(starts[document], starts[document + 1])
        outputs.append(
            _attend(
                queries[here],
                rows[here] - starts[document],
                (block0[0][there], block0[1][there]),
                [(keys[here], values[here]) for keys, values in own],
            )
        )
    return torch.cat(outputs)


def _attend(q: Tensor, positions: Tensor, block0: KeyValue, own: list[KeyValue]) -> Tensor:
    """Attention of R queries at ``positions`` of a document of T tokens: [R, heads * head_dim]."""
    num_rows, num_heads, head_dim = q.shape
    keys, values = (x.transpose(0, 1) for x in block0)  # [kv, T, head_dim]
    num_kv, length, _ = keys.shape
    # query head h reads key-value head h // group
    group = num_heads // num_kv
    q = q.view(num_rows, num_kv, group, head_dim).permute(1, 2, 0, 3)  # [kv, group, R, head_dim]
    q = q * head_dim**-0.5

    # zero rows are no special case: their product still ties keys and values to the loss,
    # so every parameter gets a gradient, which FSDP's collectives need on every rank
    causal = (q.flatten(1, 2) @ keys.transpose(1, 2)).view(num_kv, group, num_rows, length)
    future = torch.arange(length, device=q.device) > positions[:, None]  # [R, T]
    scores = [causal.masked_fill(future, -torch.inf)]
    scores += [(q * k.permute(1, 0, 2)[:, None]).sum(-1, keepdim=True) for k, _ in own]

    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.cat(scores, dim=-1).softmax(dim=-1, dtype=wide).to(values.dtype)
    over_block0, *over_own = torch.split(weights, [length] + [1] * len(own), dim=-1)
    output: Tensor = (over_block0.flatten(1, 2) @ values).view(num_kv, group, num_rows, head_dim)
    for weight, (_, v) in zip(over_own, own, strict=True):
        output = output + weight * v.permute(1, 0, 2)[:, None]
    return output.permute(2, 0, 1, 3).reshape(num_rows, num_heads * head_dim)
