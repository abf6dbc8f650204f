"""TTT attention against one dense softmax over everything a query may read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec_hpc.drafts.eagle3.attention import ttt_attention


def make(num_own: int, lengths: list[int], rows: Tensor) -> tuple[Tensor, ...]:
    n, r = sum(lengths), len(rows)
    generator = torch.Generator().manual_seed(0)
    shapes = [(r, 6, 8), (n, 2, 8), (n, 2, 8)] + [(r, 2, 8)] * (2 * num_own)
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes
    )


def run(tensors: tuple[Tensor, ...], rows: Tensor, lengths: list[int]) -> Tensor:
    q, k, v, *own = tensors
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    pairs = list(zip(own[::2], own[1::2], strict=True))
    return ttt_attention(q, rows, (k, v), pairs, cu_seqlens)


def dense(tensors: tuple[Tensor, ...], rows: Tensor, lengths: list[int]) -> Tensor:
    """Every key of every block in one table, with a mask that forbids nearly all."""
    q, k, v, *own = tensors
    keys, values = torch.cat([k, *own[::2]]), torch.cat([v, *own[1::2]])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(k))
    block0 = (document[rows][:, None] == document) & (index <= rows[:, None])
    blocks = [block0] + [torch.eye(len(rows), dtype=torch.bool)] * (len(own) // 2)
    heads = [x.transpose(0, 1)[None] for x in (q, keys, values)]
    mask = torch.cat(blocks, dim=1)
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("num_own", [0, 1, 5])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_matches_dense_attention(num_own: int, share: float) -> None:
    lengths = [7, 1, 2, 11]
    rows = (torch.rand(21, generator=torch.Generator().manual_seed(1)) < share).nonzero()[:, 0]
    tensors = make(num_own, lengths, rows)
    output, expected = run(tensors, rows, lengths), dense(tensors, rows, lengths)
    assert output.shape == (len(rows), 48)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_softmax_is_float32_in_bfloat16() -> None:
    rows = torch.arange(200)
    tensors = make(1, [200], rows)
    low = tuple(x.detach().bfloat16() for x in tensors)
    output = run(low, rows, [200])
    assert output.dtype == torch.bfloat16
    expected = run(tuple(x.double() for x in low), rows, [200])
    torch.testing.assert_close(output.double(), expected, atol=0.02, rtol=0.02)
