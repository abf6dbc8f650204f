"""Attention of the training-time test.

In TTT step i the query at position t reads the keys of block 0 (step 0) at positions s <= t of
its own document, and its own position's keys of blocks 1..i: what the draft would have
in its cache after drafting i tokens behind t (https://arxiv.org/abs/2503.01840, section 3.2).

Block 0 is ordinary causal attention, which any flash kernel does; its output and log-sum-exp are
merged exactly with the few terms of the row's own position.  Backward, a flash kernel that is
given the *merged* output and the *merged* log-sum-exp yields the gradients of the merged softmax
(the identity that ring attention rests on, https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec_hpc.drafts.eagle3.flash import CpuFlash, CudaFlash
from torchspec_hpc.drafts.eagle3.flex import flex_attention
from torchspec_hpc.drafts.eagle3.plan import StepRows

KeyValue = tuple[Tensor, Tensor]
Backend = Literal["auto", "sdpa", "flash", "flex_attention", "plain"]


class Layout(NamedTuple):
    """Where the rows of a TTT step stand in the packed batch.

    Attributes:
        rows: On the CPU.
        positions: ``rows.index`` on the device.
    """

    rows: StepRows
    positions: Tensor


class Kernel(Protocol):
    """Attention over block 0, forward and backward."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [R, heads, head_dim] and log-sum-exp [R, heads] (float32 or better)."""

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, given output and log-sum-exp of the whole softmax."""


def ttt_attention(
    q: Tensor, block0: KeyValue, own: Sequence[KeyValue], layout: Layout, backend: Backend = "auto"
) -> Tensor:
    """Attends; no score crosses a document's end, and no table of all scores is made.

    Args:
        q: [R, heads, head_dim], of the R rows that this step computes.
        block0: Keys and values [N, kv_heads, head_dim] of step 0, for every position.
        own: Keys and values of steps 1..i, [at least R, kv_heads, head_dim] each; the first R
            rows are those of ``q``.
        layout: Of the R rows.
        backend: ``auto`` chooses by device and type; see :func:`choose_backend`.

    Returns:
        [R, heads * head_dim].
    """
    name = choose_backend(q) if backend == "auto" else backend
    own = [(k[: len(q)], v[: len(q)]) for k, v in own]
    if name == "plain" or not len(q):
        out = _plain(q, block0, own, layout)
    elif name == "flex_attention":
        out = _merge(q, *flex_attention(q, *block0, layout), own)
    else:
        kernel = (CpuFlash if name == "sdpa" else CudaFlash)(layout.rows)
        out = _Merged.apply(  # type: ignore[no-untyped-call]
            kernel, q, *block0, *(x for pair in own for x in pair)
        )
    return out.flatten(1)


def choose_backend(q: Tensor) -> Backend:
    """The fastest that works: ``sdpa`` on CPUs, ``flash`` on GPUs or, in float32, flex."""
    if q.device.type == "cpu":
        return "sdpa" if q.dtype in (torch.float32, torch.float64) else "plain"
    if q.dtype in (torch.float16, torch.bfloat16):
        return "flash"
    return "flex_attention" if q.dtype == torch.float32 else "plain"


def _merge(q: Tensor, out: Tensor, lse: Tensor, own: Sequence[KeyValue]) -> Tensor:
    """Adds the terms of the rows' own positions to attention over block 0, by plain autograd."""
    if not own:
        return out
    scores = [_own_scores(q, k) for k, _ in own]
    weights = (
        torch.stack([lse, *scores]).softmax(0).to(out.dtype)[..., None]
    )  # [1 + i, R, heads, 1]
    total = weights[0] * out
    for weight, (_, v) in zip(weights[1:], own, strict=True):
        total = total + weight * _per_query(v, q)
    return total


class _Merged(torch.autograd.Function):
    """The same for kernels that have a forward and a backward pass of their own."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        out, lse = kernel.forward(q, k, v)
        if own:
            scores = torch.stack([_own_scores(q, x) for x in own[::2]])  # [i, R, heads]
            merged = torch.logsumexp(torch.cat([lse[None], scores]), 0)
            out = out * (lse - merged).exp().to(out.dtype)[..., None]
            for weight, x in zip((scores - merged).exp().to(out.dtype), own[1::2], strict=True):
                out.addcmul_(weight[..., None], _per_query(x, q))
            lse = merged
        ctx.kernel = kernel
        ctx.save_for_backward(q, k, v, out, lse, *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, out, lse)
        if not own:
            return None, d_q, d_k, d_v
        shared = _dot(d_out, out)  # [R, heads]
        d_own = []
        for own_k, own_v in zip(own[::2], own[1::2], strict=True):
            weight = (_own_scores(q, own_k) - lse).exp()
            d_score = weight * (_dot(d_out, _per_query(own_v, q)) - shared) * q.shape[-1] ** -0.5
            d_score, weight = (x.to(q.dtype)[..., None] for x in (d_score, weight))
            d_q.addcmul_(d_score, _per_query(own_k, q))
            d_own += [_per_key(d_score * q, own_k), _per_key(weight * d_out, own_v)]
        return None, d_q, d_k, d_v, *d_own


def _own_scores(q: Tensor, k: Tensor) -> Tensor:
    """[R, heads], float32 or better."""
    scale: float = q.shape[-1] ** -0.5
    return _dot(q, _per_query(k, q)) * scale


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Products of the last dimension, added up in float32 or better."""
    product: Tensor = a * b
    return product.sum(-1, dtype=torch.promote_types(a.dtype, torch.float32))


def _per_query(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [R, kv_heads, head_dim] for each query head; head h reads h // group."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _per_key(d_x: Tensor, x: Tensor) -> Tensor:
    """Adds up what the query heads of a group send back."""
    group = d_x.shape[1] // x.shape[1]
    return d_x.view(len(x), x.shape[1], group, x.shape[2]).sum(2)


def _plain(q: Tensor, block0: KeyValue, own: Sequence[KeyValue], layout: Layout) -> Tensor:
    """One softmax over all scores of each document, by plain autograd: the reference."""
    outputs = [torch.zeros_like(q[:0])]
    starts, bounds = layout.rows.cu_seqlens.tolist(), layout.rows.bounds
    order = layout.rows.order.to(q.device)
    for document, start in enumerate(starts[:-1]):
        here = order[bounds[document] : bounds[document + 1]]
        there = slice(start, starts[document + 1])
        outputs.append(
            _plain_document(
                q[here],
                layout.positions[here] - start,
                (block0[0][there], block0[1][there]),
                [(k[here], v[here]) for k, v in own],
            )
        )
    return torch.cat(outputs)[torch.argsort(order)]


def _plain_document(
    q: Tensor, positions: Tensor, block0: KeyValue, own: Sequence[KeyValue]
) -> Tensor:
    """Attention of R queries at ``positions`` of a document of T tokens: [R, heads, head_dim]."""
    # rows that are none are no special case: their product still ties keys and values to the
    # loss, so every parameter gets a gradient, which FSDP's collectives need on every rank
    keys, values = (_per_query(x, q).transpose(0, 1) for x in block0)  # [heads, T, head_dim]
    scale = q.shape[-1] ** -0.5
    causal = q.transpose(0, 1) @ keys.transpose(1, 2) * scale  # [heads, R, T]
    future = torch.arange(keys.shape[1], device=q.device) > positions[:, None]
    scores = [causal.masked_fill(future, -torch.inf)]
    scores += [(q * _per_query(k, q)).sum(-1).T[..., None] * scale for k, _ in own]
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.cat(scores, dim=-1).softmax(-1, dtype=wide).to(values.dtype)
    over_block0, *over_own = torch.split(weights, [keys.shape[1]] + [1] * len(own), dim=-1)
    out: Tensor = (over_block0 @ values).transpose(0, 1)
    for weight, (_, v) in zip(over_own, own, strict=True):
        out = out + weight.transpose(0, 1) * _per_query(v, q)
    return out
