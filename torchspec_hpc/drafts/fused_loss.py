"""Draft head and loss in one: no table of logits outlives its chunk.

Walks over target positions in chunks.  The target's distribution of a chunk is computed once and
serves all TTT steps; the gradient with respect to hidden states and head is formed right there, in
the forward pass, as in Liger's fused linear cross entropy (https://arxiv.org/abs/2410.10989).  So
memory depends on the size of a chunk, not on the number of tokens times the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspec_hpc.drafts.losses import LossMix
from torchspec_hpc.drafts.target_head import TargetHead, row_argmax

#: Value [K, C], gradient with respect to the logits [K, C, V] (None if not wanted), choice [K, C].
ChunkLoss = tuple[Tensor, Tensor | None, Tensor]

#: Bytes of a chunk's logits counted as float32.  On CPUs small enough for the caches, on GPUs large
#: enough for full speed of the matrix products, whose result is the head's gradient.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}


class Targets(NamedTuple):
    """What the predictions are compared with.

    Attributes:
        head: The target's norm and the rows of its head that the draft's head has.
        last: [n, H], pre-norm outputs of the target's last layer at the target positions.
        token: [n] int64, the data's next token as an index of the draft's vocabulary; -1: none.
        pairs: [K, n] int64, row of ``states`` that predicts the target in each TTT step; any
            number from S on: none.
    """

    head: TargetHead
    last: Tensor
    token: Tensor
    pairs: Tensor


class FusedLoss(NamedTuple):
    """Sums over the predictions that there are.

    Attributes:
        loss: Scalar, ``sum_k scale_k * loss_sums_k``; differentiable.
        loss_sums: [K] float64.
        correct: [K] int64, predictions whose most probable token is the target's.
    """

    loss: Tensor
    loss_sums: Tensor
    correct: Tensor


def fused_loss(
    states: Tensor,
    weight: Tensor,
    targets: Targets,
    scale: Tensor,
    mix: LossMix,
    *,
    compiled: bool = False,
    chunk_bytes: int | None = None,
) -> FusedLoss:
    """Compares ``states @ weight.T`` with the target's distribution.

    Args:
        states: [S, H], normalised outputs of the draft, of all TTT steps.
        weight: [V, H], the draft's head; frozen if it needs no gradient.
        targets: n target positions.
        scale: [K], factor of each TTT step's sum in the loss.
        mix: The loss.
        compiled: Fuse the elementwise part with torch.compile.
        chunk_bytes: Size of a chunk's logits in float32; None: :data:`CHUNK_BYTES`.
    """
    limit = chunk_bytes or CHUNK_BYTES[states.device.type]
    num_steps = len(targets.pairs)
    chunk = max(1, limit // (4 * weight.shape[0] * num_steps))
    loss_of = _loss_function(mix, compiled)
    if not torch.is_grad_enabled():  # a parameter would still be said to need a gradient
        states, weight = states.detach(), weight.detach()
    found = _Fused.apply(  # type: ignore[no-untyped-call]
        states, weight, targets, scale, loss_of, chunk
    )
    return FusedLoss(*found)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Targets,
        scale: Tensor,
        loss_of: Callable[..., ChunkLoss],
        chunk: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_states, wants_weight = ctx.needs_input_grad[:2]
        (num_steps, num_targets), num_states = targets.pairs.shape, len(states)
        # one more row, for what there is not
        d_states = states.new_zeros(num_states + 1, states.shape[1]) if wants_states else None
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        sums = torch.zeros(num_steps, dtype=torch.float64, device=states.device)
        correct = torch.zeros(num_steps, dtype=torch.int64, device=states.device)
        for start in range(0, num_targets, chunk):
            here = slice(start, start + chunk)
            pairs = targets.pairs[:, here]  # [K, C]
            exists = pairs < num_states
            x = states.index_select(0, pairs.clamp(max=num_states - 1).flatten())
            logits = F.linear(x, weight).view(*pairs.shape, -1)  # [K, C, V]
            target_logits = targets.head.logits(targets.last[here])
            best = row_argmax(target_logits)  # [C]
            value, gradient, choice = loss_of(
                logits,
                target_logits,
                targets.token[here],
                scale[:, None] * exists,
                wants_states or wants_weight,
            )
            sums += (value.double() * exists).sum(1)
            correct += ((choice == best) & exists).sum(1)
            if gradient is None:
                continue
            gradient = gradient.flatten(0, 1)  # [K C, V]
            if d_states is not None:
                d_states.index_copy_(0, pairs.flatten().clamp(max=num_states), gradient @ weight)
            if d_weight is not None:
                _add_product(d_weight, gradient.T, x)
        ctx.d_states = None if d_states is None else d_states[:-1]
        ctx.d_weight = d_weight
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(sums, correct)
        return (sums * scale).sum(), sums, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_states, d_weight = ctx.d_states, ctx.d_weight
        if d_states is None and d_weight is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass")
        ctx.d_states = ctx.d_weight = None  # the caller's now: changed in place
        if d_states is not None:
            d_states = d_states.mul_(d_loss.to(d_states.dtype))
        if d_weight is not None:
            d_weight = d_weight.mul_(d_loss.to(d_weight.dtype)).to(ctx.weight_dtype)
        return d_states, d_weight, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, added up in the type of ``total``."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@lru_cache(maxsize=8)  # one compiled function per loss, not per call
def _loss_function(mix: LossMix, compiled: bool) -> Callable[..., ChunkLoss]:
    """The loss of a chunk's logits."""

    def loss_of(
        logits: Tensor, target_logits: Tensor, token: Tensor, scale: Tensor, wanted: bool
    ) -> ChunkLoss:
        wide = torch.promote_types(logits.dtype, torch.float32)
        choice = row_argmax(logits)
        value, gradient = mix(logits.to(wide), target_logits.to(wide), token)
        if not wanted:
            return value, None, choice
        return value, (gradient * scale[..., None]).to(logits.dtype), choice

    if compiled:
        return torch.compile(loss_of, dynamic=True)
    return _forward_kl_in_place if mix.is_forward_kl else loss_of


def _forward_kl_in_place(
    logits: Tensor, target_logits: Tensor, _token: Tensor, scale: Tensor, wanted: bool
) -> ChunkLoss:
    """:func:`~torchspec_hpc.drafts.losses.forward_kl` in as few passes as eager mode allows."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z, p = logits.to(wide), target_logits.to(wide).softmax(-1)
    choice = row_argmax(z)
    q = z.softmax(-1)
    # log sum exp z, from the largest logit and its probability: one pass fewer
    highest, likeliest = (x.gather(-1, choice[..., None])[..., 0] for x in (z, q))
    value = highest - likeliest.log() - z.mul_(p).sum(-1)
    if not wanted:
        return value, None, choice
    return value, q.sub_(p).mul_(scale[..., None]).to(logits.dtype), choice
