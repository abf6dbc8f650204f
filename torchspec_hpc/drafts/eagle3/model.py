"""The EAGLE-3 draft of Llama type and its unrolled training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchspec_hpc.drafts.batch import PackedBatch, upload
from torchspec_hpc.drafts.eagle3.attention import Backend, KeyValue, Layout, ttt_attention
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.layers import CosSin, MidLayer
from torchspec_hpc.drafts.eagle3.plan import TTTPlan
from torchspec_hpc.drafts.eagle3.ttt import TTTOutput
from torchspec_hpc.drafts.fused_loss import Targets, fused_loss
from torchspec_hpc.drafts.losses import FORWARD_KL, LossMix
from torchspec_hpc.drafts.norm import RMSNorm
from torchspec_hpc.drafts.rope import RotaryEmbedding
from torchspec_hpc.drafts.target_head import TargetHead

if TYPE_CHECKING:
    from torchspec_hpc.target.weights import TargetTensors

INIT_STD = 0.02


@dataclass(frozen=True)
class ComputeOptions:
    """What a training step minimises, and how it is computed.

    Attributes:
        loss: What is minimised; nothing else here changes the result but for rounding.
        attention_backend: See :func:`~torchspec_hpc.drafts.eagle3.attention.ttt_attention`.
        gradient_checkpointing: Keep a TTT step's input only, and compute the rest again.
        compiled: Fuse elementwise work with torch.compile.
        loss_chunk_bytes: See :func:`~torchspec_hpc.drafts.fused_loss.fused_loss`.
    """

    loss: LossMix = FORWARD_KL
    attention_backend: Backend = "auto"
    gradient_checkpointing: bool = False
    compiled: bool = False
    loss_chunk_bytes: int | None = None


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
        options: How the training step is computed.
    """

    embedding: Tensor
    kept_ids: Tensor | None
    t2d: Tensor | None
    d2t: Tensor | None
    draft_ids: Tensor | None

    def __init__(
        self,
        config: Eagle3Config,
        embedding: Tensor,
        kept_ids: Tensor | None = None,
        options: ComputeOptions = ComputeOptions(),
    ) -> None:
        super().__init__()
        self.config, self.options = config, options
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
        t2d = d2t = draft_ids = None
        if kept_ids is None:
            if draft_vocab != vocab:
                raise ValueError(f"a draft vocabulary of {draft_vocab} of {vocab} needs kept_ids")
        else:
            ascending = bool((kept_ids.diff() > 0).all())
            if len(kept_ids) != draft_vocab or not ascending:
                raise ValueError(f"kept_ids must be {draft_vocab} different ids, ascending")
            t2d = torch.zeros(vocab, dtype=torch.bool).index_fill(0, kept_ids, True)
            d2t = kept_ids - torch.arange(draft_vocab)
            draft_ids = torch.full((vocab,), -1).index_copy_(0, kept_ids, torch.arange(draft_vocab))
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("kept_ids", kept_ids, persistent=False)
        self.register_buffer("t2d", t2d, persistent=False)  # [V] bool: is kept
        self.register_buffer("d2t", d2t, persistent=False)  # [V_draft]: target id - draft id
        self.register_buffer("draft_ids", draft_ids, persistent=False)  # [V], -1: not kept

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
        plan: TTTPlan,
        num_trained: Tensor,
        step_weights: Tensor,
    ) -> TTTOutput:
        """Runs all TTT steps of a micro-batch.

        Args:
            batch: N tokens.
            head: The target's norm, and its head's rows of the draft's vocabulary.
            plan: Of the micro-batch.
            num_trained: [K], trained predictions of the whole optimizer step: all micro-batches of
                all ranks.
            step_weights: [K], w.

        Returns:
            ``loss = sum_i w_i * loss_sum_i / num_trained_i``, and what the metrics need.
        """
        states = self.norm(torch.cat(list(self._unroll(batch, plan))))
        at = upload(plan.targets, states.device)
        token = batch.input_ids[(at + 1).clamp(max=batch.num_tokens - 1)]
        targets = Targets(
            head=head,
            last=batch.last.index_select(0, at),
            token=token if self.draft_ids is None else self.draft_ids[token],
            pairs=upload(plan.pairs, states.device),
        )
        # 0 / 0 counts as 0
        scale = torch.where(num_trained > 0, step_weights / num_trained.clamp(min=1), 0.0)
        found = fused_loss(
            states,
            self.lm_head.weight,
            targets,
            scale,
            self.options.loss,
            compiled=self._compiled(len(states)),
            chunk_bytes=self.options.loss_chunk_bytes,
        )
        return TTTOutput(*found)

    def _unroll(self, batch: PackedBatch, plan: TTTPlan) -> Iterator[Tensor]:
        """Yields for each TTT step i the layer's output [R_i, H] at the rows that it computes."""
        rows = upload(plan.rows, batch.input_ids.device)
        positions = batch.position_ids
        lengths = plan.steps[0].cu_seqlens.diff()
        frequencies = self.rope.frequencies(lengths, rows.device)[batch.document_ids]
        for_embeds, for_hidden = self.midlayer.projections()
        # of each token, whichever step reads it: step i at t reads t + 1 + i
        embeds = F.embedding(batch.input_ids, self.embedding).to(for_embeds.dtype)
        embeds = F.linear(self.midlayer.input_layernorm(embeds), for_embeds)
        hidden = self.fc(batch.aux.to(self.fc.weight.dtype))  # g^0, [N, H]

        num_queries = self.config.num_attention_heads * self.config.head_dim
        block0 = self.midlayer.project(
            embeds[:, num_queries:],
            # the last position of a document reads the next one's token (the last of all its
            # own), but no step computes such a row and no row reads its key
            torch.arange(1, batch.num_tokens + 1, device=rows.device).clamp(max=len(positions) - 1),
            hidden,
            for_hidden[num_queries:],
            self.rope.cos_sin(positions, frequencies),
            self.config.num_key_value_heads,
            self._compiled(batch.num_tokens),
        )
        hidden, frequencies, positions = (
            x.index_select(0, rows) for x in (hidden, frequencies, positions)
        )
        run: Callable[..., tuple[Tensor, ...]] = self._step
        if self.options.gradient_checkpointing and torch.is_grad_enabled():
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        own: list[Tensor] = []
        for step, here in enumerate(plan.steps):
            count = len(here.index)
            layout = Layout(here, rows[:count])
            cos_sin = self.rope.cos_sin(positions[:count] + step, frequencies[:count])
            hidden, *new = run(
                embeds, hidden[:count], for_hidden, cos_sin, step, layout, block0, *own
            )
            own += new
            yield hidden

    def _step(
        self,
        embeds: Tensor,
        hidden: Tensor,
        weight: Tensor,
        cos_sin: CosSin,
        step: int,
        layout: Layout,
        block0: KeyValue,
        *own: Tensor,
    ) -> tuple[Tensor, ...]:
        """One TTT step: the layer's output [R, H], from step 1 on also the rows' keys and values.

        Args:
            embeds: [N, width], projected embeddings of all tokens.
            hidden: [R, H], the step before's output.
            weight: [width, H], projects hidden states.
            cos_sin: [R, head_dim] each.
            step: i.
            layout: Where the R rows stand.
            block0: Keys and values of all positions.
            own: Keys and values, in turn, of steps 1..i-1 at the rows they computed.
        """
        tokens, compiled = layout.positions + 1 + step, self._compiled(len(hidden))
        project, config = self.midlayer.project, self.config
        if step == 0:  # keys and values of all positions are block 0
            num_queries = config.num_attention_heads * config.head_dim
            embeds, weight = embeds[:, :num_queries], weight[:num_queries]
            queries, _ = project(embeds, tokens, hidden, weight, cos_sin, 0, compiled)
        else:
            num_keys = config.num_key_value_heads
            rotated, values = project(embeds, tokens, hidden, weight, cos_sin, num_keys, compiled)
            queries, keys = torch.split(rotated, [config.num_attention_heads, num_keys], dim=1)
            own = (*own, keys, values)
        pairs = list(zip(own[::2], own[1::2], strict=True))
        backend = self.options.attention_backend
        attended = ttt_attention(queries, block0, pairs, layout, backend, compiled)
        return self.midlayer.output(hidden, attended, compiled), *own[-2:]

    def _compiled(self, num_rows: int) -> bool:
        """Whether a part is compiled: for training, and for more rows than a compiler treats apart.

        Graphs of their own for evaluation, for no row and for one would be compiled for little
        use, and would count towards torch.compile's limit of graphs per function.
        """
        return self.options.compiled and torch.is_grad_enabled() and num_rows > 1
