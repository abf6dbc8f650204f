"""Layers of the EAGLE-3 draft of Llama type: parameters, and pure functions of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec_hpc.drafts.compiling import fused
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.norm import RMSNorm, rms_norm
from torchspec_hpc.drafts.rope import rotate

CosSin = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Projections of the draft's attention; queries, keys and values come from 2H."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class MidLayer(nn.Module):
    """The draft's decoder layer: reads embedding and hidden state, adds to the hidden state.

    The attention's input is ``[embedding; hidden]``, so each projection is a sum of two, and the
    one that reads the embedding is the same for a token in whatever TTT step it is read.
    """

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def projections(self) -> tuple[Tensor, Tensor]:
        """Weights of queries, keys and values, [heads and twice kv_heads, H] each.

        Returns:
            Those that read the embedding, and those that read the hidden state.
        """
        parts = (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        for_embeds, for_hidden = torch.cat([part.weight for part in parts]).chunk(2, dim=1)
        return for_embeds, for_hidden

    def project(
        self,
        embeds: Tensor,
        tokens: Tensor,
        hidden: Tensor,
        weight: Tensor,
        cos_sin: CosSin,
        num_plain: int,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Heads of rows, rotated but for the last ones.

        Args:
            embeds: [N, width], projected embeddings of all tokens.
            tokens: [R], the one that each row reads.
            hidden: [R, H].
            weight: [width, H], of :meth:`projections`.
            cos_sin: [R, head_dim] each.
            num_plain: Heads that are not rotated: the values.
            compiled: Fuse elementwise work.

        Returns:
            [R, *, head_dim] each: rotated heads, and the others.
        """
        norm = self.hidden_norm
        heads: tuple[Tensor, Tensor] = fused(_project, compiled)(
            embeds, tokens, hidden, norm.weight, norm.eps, weight, cos_sin, num_plain
        )
        return heads

    def output(self, hidden: Tensor, attended: Tensor, compiled: bool) -> Tensor:
        """Adds what attention read [R, heads * head_dim] and the MLP to ``hidden`` [R, H]."""
        norm, mlp = self.post_attention_layernorm, self.mlp
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        updated: Tensor = fused(_output, compiled)(
            hidden, attended, self.self_attn.o_proj.weight, norm.weight, norm.eps, *weights
        )
        return updated


def _project(
    embeds: Tensor,
    tokens: Tensor,
    hidden: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    cos_sin: CosSin,
    num_plain: int,
) -> tuple[Tensor, Tensor]:
    x = embeds.index_select(0, tokens) + F.linear(rms_norm(hidden, norm, eps), weight)
    head_dim = cos_sin[0].shape[1]
    x = x.view(len(x), x.shape[1] // head_dim, head_dim)
    num_rotated = x.shape[1] - num_plain
    return rotate(x[:, :num_rotated], cos_sin), x[:, num_rotated:]


def _output(
    hidden: Tensor,
    attended: Tensor,
    o_proj: Tensor,
    norm: Tensor,
    eps: float,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
) -> Tensor:
    hidden = hidden + F.linear(attended, o_proj)
    x = rms_norm(hidden, norm, eps)
    return hidden + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
