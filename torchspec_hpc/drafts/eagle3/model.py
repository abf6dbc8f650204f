"""The EAGLE-3 draft of Llama type and its unrolled training step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.drafts.eagle3.attention import KeyValue, ttt_attention
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.ttt import (
    Supervision,
    TargetDistributions,
    TTTOutput,
    soft_cross_entropy,
)
from torchspec_hpc.drafts.norm import RMSNorm
from torchspec_hpc.drafts.rope import RotaryEmbedding, rotate
from torchspec_hpc.drafts.target_head import TargetHead

if TYPE_CHECKING:
    from torchspec_hpc.target.weights import TargetTensors

CosSin = tuple[Tensor, Tensor]
INIT_STD = 0.02


class Attention(nn.Module):
    """Projections of the draft's attention; queries, keys and values come from 2H."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)

    def queries(self, z: Tensor, cos_sin: CosSin) -> Tensor:
        """[N, 2H] to [N, heads, head_dim]."""
        return rotate(self._heads(self.q_proj(z)), cos_sin)

    def keys_values(self, z: Tensor, cos_sin: CosSin) -> KeyValue:
        """[N, 2H] to two of [N, kv_heads, head_dim]."""
        return rotate(self._heads(self.k_proj(z)), cos_sin), self._heads(self.v_proj(z))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1] // self.head_dim, self.head_dim)


class MLP(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] to [N, H]."""
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class MidLayer(nn.Module):
    """The draft's decoder layer: reads embedding and hidden state, adds to the hidden state."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def attention_input(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """[N, H] and [N, H] to [N, 2H], embedding first."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Adds what attention read [N, heads * head_dim] and the MLP to ``hidden`` [N, H]."""
        hidden = hidden + self.self_attn.o_proj(attended)
        updated: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return updated


class Eagle3Draft(nn.Module):
    """EAGLE-3 draft, Llama type. Parameters are named as the engines load them.

    ``forward`` is the whole training step, loss included: FSDP2 wraps this root module alone,
    so parameters are whole only in here.  With FSDP2's mixed precision use
    ``MixedPrecisionPolicy(cast_forward_inputs=False)``: the batch has its dtype already, and
    the weights of the loss must stay exact.

    Args:
        config: The draft's shape.
        embedding: [V, H], the target's; frozen, not in the state dict.
        kept_ids: [V_draft] int64, ascending target ids of the draft's vocabulary; None if
            that is the target's vocabulary.
    """

    embedding: Tensor
    kept_ids: Tensor | None
    t2d: Tensor | None
    d2t: Tensor | None

    def __init__(
        self, config: Eagle3Config, embedding: Tensor, kept_ids: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = nn.Linear(len(config.aux_layers) * hidden, hidden, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = RMSNorm(hidden, config.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.rope = RotaryEmbedding(
            config.rope_parameters, config.head_dim, config.max_position_embeddings
        )
        self._register_vocabulary(embedding.detach(), kept_ids)

    def _register_vocabulary(self, embedding: Tensor, kept_ids: Tensor | None) -> None:
        vocab, draft_vocab = self.config.vocab_size, self.config.draft_vocab_size
        if embedding.shape != (vocab, self.config.hidden_size):
            raise ValueError(f"embedding is {tuple(embedding.shape)}, the draft is {self.config}")
        t2d = d2t = None
        if kept_ids is None:
            if draft_vocab != vocab:
                raise ValueError(f"a draft vocabulary of {draft_vocab} of {vocab} needs kept_ids")
        else:
            ascending = bool((kept_ids.diff() > 0).all())
            if len(kept_ids) != draft_vocab or not ascending:
                raise ValueError(f"kept_ids must be {draft_vocab} different ids, ascending")
            t2d = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept_ids, True)
            d2t = kept_ids - torch.arange(draft_vocab)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("kept_ids", kept_ids, persistent=False)
        self.register_buffer("t2d", t2d, persistent=False)  # [V] bool: is kept
        self.register_buffer("d2t", d2t, persistent=False)  # [V_draft]: target id - draft id

    @torch.no_grad()
    def initialize(self, target: TargetTensors, seed: int) -> None:
        """Sets every parameter: head and final norm from the target, the rest at random.

        Args:
            target: The target's norm and head.
            seed: The same seed gives the same weights, on any number of processes.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name != "lm_head.weight":
                noise = torch.randn(parameter.shape, generator=generator) * INIT_STD
                parameter.copy_(noise)
        self.norm.weight.copy_(target.norm)
        kept = slice(None) if self.kept_ids is None else self.kept_ids.to(target.lm_head.device)
        self.lm_head.weight.copy_(target.lm_head[kept])

    def forward(
        self,
        batch: PackedBatch,
        head: TargetHead,
        argmax: Tensor,
        supervision: Supervision,
        num_trained: Tensor,
        step_weights: Tensor,
    ) -> TTTOutput:
        """Runs all TTT steps of a micro-batch.

        Args:
            batch: N tokens.
            head: The target's head.
            argmax: [N] int64, the target's choices.
            supervision: [K, N] each.
            num_trained: [K] int64, trained positions of the whole optimizer step: all
                micro-batches of all ranks.
            step_weights: [K] float32, w.

        Returns:
            ``loss = sum_i w_i * loss_sum_i / num_trained_i``, and what the metrics need.
        """
        trained = supervision.trained
        targets = TargetDistributions(head, batch.last, trained, self.kept_ids)
        loss_sums, correct = [], []
        for step, (rows, hidden) in enumerate(self._unroll(batch, trained)):
            here = trained[step, rows]  # the others are computed for a later step
            rows, logits = rows[here], self.lm_head(self.norm(hidden[here]))
            loss_sums.append(soft_cross_entropy(logits, targets.at(rows + 1 + step)))
            # a position that is scored but not trained is a miss: the draft has no such token
            choice = logits.detach().argmax(-1)
            choice = choice if self.kept_ids is None else self.kept_ids[choice]
            correct.append((choice == argmax[rows + 1 + step]).sum())
        sums = torch.stack(loss_sums)
        # 0 / 0 counts as 0
        share = torch.where(num_trained > 0, step_weights / num_trained.clamp(min=1), 0.0)
        return TTTOutput(
            loss=(sums * share).sum(),
            loss_sums=sums.detach(),
            correct=torch.stack(correct),
            scored=supervision.scored.sum(1),
            trained=trained.sum(1),
        )

    def _unroll(self, batch: PackedBatch, trained: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields for each TTT step the positions [R] it computes and their states [R, H].

        From step 1 on, a position's state is read by nobody but the same position in later
        steps.  So step i computes only the positions that some step >= i trains.  Block 0's
        keys and values are made for every position.
        """
        attention = self.midlayer.self_attn
        frequencies = self.rope.frequencies(batch.lengths)[batch.document_ids]
        positions = batch.position_ids
        rows = torch.arange(batch.num_tokens, device=positions.device)
        hidden = self.fc(batch.aux.to(self.fc.weight.dtype))  # g^0
        block0: KeyValue | None = None
        own: list[KeyValue] = []
        for step in range(len(trained)):
            if block0 is not None:
                keep = trained[step:].any(0)[rows].nonzero()[:, 0]
                rows, hidden = rows[keep], hidden.index_select(0, keep)
                own = [(k.index_select(0, keep), v.index_select(0, keep)) for k, v in own]
            # x_{t+1+i}: at the last position of a document it belongs to the next one (or is
            # clamped), but such a row is never trained and no trained row reads its key
            tokens = batch.input_ids[(rows + 1 + step).clamp(max=batch.num_tokens - 1)]
            embeds = F.embedding(tokens, self.embedding).to(hidden.dtype)
            z = self.midlayer.attention_input(embeds, hidden)
            cos_sin = self.rope.cos_sin(positions[rows] + step, frequencies[rows])
            keys_values = attention.keys_values(z, cos_sin)
            if block0 is None:
                block0 = keys_values
                keep = trained.any(0).nonzero()[:, 0]
                rows, hidden, z = rows[keep], hidden.index_select(0, keep), z.index_select(0, keep)
                cos_sin = (cos_sin[0][keep], cos_sin[1][keep])
            else:
                own.append(keys_values)
            queries = attention.queries(z, cos_sin)
            attended = ttt_attention(queries, rows, block0, own, batch.cu_seqlens)
            hidden = self.midlayer.output(hidden, attended)
            yield rows, hidden
