"""The training step as the reference system and its peers write it: padded, and in tables.

Pads samples to one length, joins the keys of all blocks, multiplies by the target's head in every
TTT step and keeps ``[B, T, V]`` logits of each.  Computes the same loss as the package, with
autograd alone: what fast paths are compared with, in values, gradients, time and memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.rope import rotate
from torchspec_hpc.drafts.target_head import TargetHead


class PaddedBatch(NamedTuple):
    """B samples, padded to T tokens.

    Attributes:
        input_ids: [B, T].
        loss_mask: [B, T] bool, false in padding.
        states: [B, T, A+1, H].
        lengths: [B].
    """

    input_ids: Tensor
    loss_mask: Tensor
    states: Tensor
    lengths: Tensor


def pad(samples: list[tuple[Tensor, Tensor, Tensor]]) -> PaddedBatch:
    """Samples of (token ids [T], loss mask [T], states [T, A+1, H])."""
    ids, masks, states = (
        torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True)
        for part in zip(*samples, strict=True)
    )
    return PaddedBatch(ids, masks.bool(), states, torch.tensor([len(s[0]) for s in samples]))


def shift(x: Tensor, by: int) -> Tensor:
    """Moves [B, T, ...] to the left; zeros come in."""
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


def trained_positions(
    draft: Eagle3Draft, head: TargetHead, batch: PaddedBatch, ttt_length: int
) -> list[Tensor]:
    """For each TTT step the trained positions, [B, T] bool."""
    masks = [shift(batch.loss_mask, 2 + step) for step in range(ttt_length)]
    if draft.t2d is None:
        return masks
    with torch.no_grad():
        kept = draft.t2d[head.logits(batch.states[:, :, -1]).argmax(-1)]
    return [mask & shift(kept, 1 + step) for step, mask in enumerate(masks)]


def loss(
    draft: Eagle3Draft,
    head: TargetHead,
    batch: PaddedBatch,
    trained: list[Tensor],
    num_trained: Tensor,
    step_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Loss of a micro-batch, and its sums [K] by TTT step.

    Args:
        draft: The draft.
        head: The target's whole head.
        batch: The samples.
        trained: Of :func:`trained_positions`.
        num_trained: [K], of the whole optimizer step.
        step_weights: [K].
    """
    last = batch.states[:, :, -1]
    hidden = draft.fc(batch.states[:, :, :-1].flatten(2))
    mask = attention_mask(batch)
    blocks: list[tuple[Tensor, Tensor]] = []
    total, sums = hidden.new_zeros(()), []
    for step, positions in enumerate(trained):
        hidden = layer(draft, batch, hidden, step, blocks, mask)
        logits = draft.lm_head(draft.norm(hidden))
        with torch.no_grad():
            targets = head.logits(shift(last, 1 + step))
            if draft.kept_ids is not None:
                targets = targets[..., draft.kept_ids]
            targets = targets.float().softmax(-1).to(targets.dtype)
        entropy = -(targets * logits.log_softmax(-1)).sum(-1)
        sums.append((entropy * positions).sum())
        total = total + step_weights[step] * sums[-1] / num_trained[step].clamp(min=1)
    return total, torch.stack(sums)


def layer(
    draft: Eagle3Draft,
    batch: PaddedBatch,
    hidden: Tensor,
    step: int,
    blocks: list[tuple[Tensor, Tensor]],
    mask: Tensor,
) -> Tensor:
    """The decoder layer at all positions; adds its keys and values to ``blocks``."""
    mid, config = draft.midlayer, draft.config
    attention, length = mid.self_attn, hidden.shape[1]
    embeds = F.embedding(shift(batch.input_ids, 1 + step), draft.embedding).to(hidden.dtype)
    z = torch.cat([mid.input_layernorm(embeds), mid.hidden_norm(hidden)], dim=-1)
    frequencies = draft.rope.frequencies(torch.tensor([length]), z.device)
    positions = torch.arange(length, device=z.device) + step
    cos_sin = draft.rope.cos_sin(positions, frequencies.expand(length, -1))

    def heads(x: Tensor, rotated: bool) -> Tensor:
        x = x.unflatten(-1, (-1, config.head_dim))  # [B, T, heads, head_dim]
        x = torch.stack([rotate(row, cos_sin) for row in x]) if rotated else x
        return x.transpose(1, 2)

    keys, values = heads(attention.k_proj(z), True), heads(attention.v_proj(z), False)
    blocks.append((keys, values))
    attended = F.scaled_dot_product_attention(
        heads(attention.q_proj(z), True),
        torch.cat([k for k, _ in blocks], dim=2),
        torch.cat([v for _, v in blocks], dim=2),
        attn_mask=mask[:, :, : (step + 1) * length],
        enable_gqa=True,
    )
    hidden = hidden + attention.o_proj(attended.transpose(1, 2).flatten(2))
    y, mlp = mid.post_attention_layernorm(hidden), mid.mlp
    return hidden + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


def attention_mask(batch: PaddedBatch, num_blocks: int = 16) -> Tensor:
    """[1, T, num_blocks * T] bool: block 0 causally, of the others the own position."""
    length = batch.input_ids.shape[1]
    device = batch.input_ids.device
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    own = torch.eye(length, dtype=torch.bool, device=device)
    return torch.cat([causal] + [own] * (num_blocks - 1), dim=1)[None]
