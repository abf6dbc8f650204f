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

from torchspec_hpc.drafts.compiling import fused
from torchspec_hpc.drafts.eagle3.flash import CpuFlash, CudaFlash, PackageFlash
from torchspec_hpc.drafts.eagle3.flex import FLEX_MIN_HEAD_DIM, flex_attention
from torchspec_hpc.drafts.eagle3.plan import StepRows

KeyValue = tuple[Tensor, Tensor]
Backend = Literal["auto", "sdpa", "flash", "flash_attn", "flex_attention", "plain"]
_KERNELS = {"sdpa": CpuFlash, "flash": CudaFlash, "flash_attn": PackageFlash}


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
    q: Tensor,
    block0: KeyValue,
    own: Sequence[KeyValue],
    layout: Layout,
    backend: Backend = "auto",
    compiled: bool = False,
) -> Tensor:
    """Attends; no score crosses a document's end, and no table of all scores is made.

    Args:
        q: [R, heads, head_dim], of the R rows that this step computes.
        block0: Keys and values [N, kv_heads, head_dim] of step 0, for every position.
        own: Keys and values of steps 1..i, [at least R, kv_heads, head_dim] each; the first R
            rows are those of ``q``.
        layout: Of the R rows.
        backend: ``auto`` chooses by device and type; see :func:`choose_backend`.
        compiled: Fuse what is no kernel's work with torch.compile.

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
        kernel = _KERNELS[name](layout.rows)
        out = _Merged.apply(  # type: ignore[no-untyped-call]
            kernel, compiled, q, *block0, *(x for pair in own for x in pair)
        )
    return out.flatten(1)


def choose_backend(q: Tensor) -> Backend:
    """The fastest that works: ``sdpa`` on CPUs, ``flash`` on GPUs or, in float32, flex."""
    if q.device.type == "cpu":
        return "sdpa" if q.dtype in (torch.float32, torch.float64) else "plain"
    if q.dtype in (torch.float16, torch.bfloat16):
        return "flash"
    fits_flex = q.dtype == torch.float32 and q.shape[-1] >= FLEX_MIN_HEAD_DIM
    return "flex_attention" if fits_flex else "plain"


def _merge(q: Tensor, out: Tensor, lse: Tensor, own: Sequence[KeyValue]) -> Tensor:
    """Adds the terms of the rows' own positions to attention over block 0, by plain autograd."""
    if not own:
        return out
    keys, values = (torch.stack(part, 2) for part in zip(*own, strict=True))
    weights = torch.cat([lse[..., None], _own_scores(q, keys)], -1).softmax(-1).to(out.dtype)
    return weights[..., :1] * out + _mix(weights[..., 1:], values)


class _Merged(torch.autograd.Function):
    """The same for kernels that have a forward and a backward pass of their own."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, compiled: bool, q: Tensor, k: Tensor, v: Tensor, *own: Tensor
    ) -> Tensor:
        out, lse = kernel.forward(q, k, v)
        if own:
            keys, values = torch.stack(own[::2], 2), torch.stack(own[1::2], 2)
            out, lse = fused(_add_own, compiled)(q, out, lse, keys, values)
        ctx.kernel, ctx.compiled = kernel, compiled
        ctx.save_for_backward(q, k, v, out, lse, *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        d_q, d_k, d_v = ctx.kernel.backward(d_out, q, k, v, out, lse)
        if not own:
            return None, None, d_q, d_k, d_v
        keys, values = torch.stack(own[::2], 2), torch.stack(own[1::2], 2)
        d_q, d_keys, d_values = fused(_own_gradients, ctx.compiled)(
            d_q, d_out, q, out, lse, keys, values
        )
        d_own = (x for pair in zip(d_keys.unbind(2), d_values.unbind(2), strict=True) for x in pair)
        return None, None, d_q, d_k, d_v, *d_own


def _add_own(
    q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges attention over block 0 with the rows' own keys [R, kv_heads, i, head_dim]."""
    scores = _own_scores(q, keys)
    merged = torch.logaddexp(lse, torch.logsumexp(scores, -1))
    weights = (scores - merged[..., None]).exp().to(out.dtype)
    share = (lse - merged).exp().to(out.dtype)
    return out * share[..., None] + _mix(weights, values), merged


def _own_gradients(
    d_q: Tensor, d_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries (added to ``d_q``), own keys and own values."""
    weights = (_own_scores(q, keys) - lse[..., None]).exp()  # [R, heads, i]
    shared = (d_out * out).sum(-1, keepdim=True, dtype=lse.dtype)
    d_scores = weights * (_products(d_out, values) - shared) * q.shape[-1] ** -0.5
    d_scores, weights = d_scores.to(q.dtype), weights.to(q.dtype)
    return d_q + _mix(d_scores, keys), _spread(d_scores, q, keys), _spread(weights, d_out, values)


def _own_scores(q: Tensor, keys: Tensor) -> Tensor:
    """Scores of each row's own keys: [R, heads, i], float32 or better."""
    scale: float = q.shape[-1] ** -0.5
    return _products(q, keys) * scale


# Tiny matrix products: a library does them best in eager mode, and a compiler as sums.


def _products(x: Tensor, keys: Tensor) -> Tensor:
    """``x`` [R, heads, head_dim] times [R, kv_heads, i, head_dim]: [R, heads, i], as scores."""
    wide, x = torch.promote_types(x.dtype, torch.float32), _grouped(x, keys)
    if torch.compiler.is_compiling():
        found = (x[:, :, :, None] * keys[:, :, None]).sum(-1, dtype=wide)
    else:
        found = torch.matmul(x, keys.transpose(2, 3)).to(wide)
    return found.flatten(1, 2)


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    """Adds values [R, kv_heads, i, head_dim] by weight [R, heads, i]: [R, heads, head_dim]."""
    weights = _grouped(weights, values)
    if torch.compiler.is_compiling():
        return (weights[..., None] * values[:, :, None]).sum(3).flatten(1, 2)
    return torch.matmul(weights, values).flatten(1, 2)


def _spread(weights: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """The transpose of :func:`_mix`: ``x`` [R, heads, head_dim] to [R, kv_heads, i, head_dim]."""
    weights, x = _grouped(weights, like), _grouped(x, like)
    if torch.compiler.is_compiling():
        return (weights[..., None] * x[:, :, :, None]).sum(2)
    return torch.matmul(weights.transpose(2, 3), x)


def _grouped(x: Tensor, like: Tensor) -> Tensor:
    """[R, heads, *] as [R, kv_heads, group, *]; query head h reads key-value head h // group."""
    return x.reshape(x.shape[0], like.shape[1], x.shape[1] // like.shape[1], x.shape[2])


def _per_query(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [T, kv_heads, head_dim] for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


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
