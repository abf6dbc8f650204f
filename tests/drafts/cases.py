"""Small random drafts, targets and documents."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import ComputeOptions, Eagle3Draft
from torchspec_hpc.drafts.eagle3.plan import TTTPlan, make_plan, scored_targets
from torchspec_hpc.drafts.eagle3.ttt import TTTOutput
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.target.weights import TargetTensors

THETA = 10000.0
EPS = 1e-5
DEFAULT_OPTIONS = ComputeOptions()
Document = tuple[Tensor, Tensor, Tensor]


def make_config(*, vocab: int = 40, draft_vocab: int = 40, hidden: int = 24) -> Eagle3Config:
    return Eagle3Config(
        hidden_size=hidden,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,  # heads * head_dim differs from hidden
        vocab_size=vocab,
        draft_vocab_size=draft_vocab,
        aux_layers=(1, 2),
        rms_norm_eps=EPS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )


@dataclass
class Case:
    """A draft with the target it learns from."""

    draft: Eagle3Draft
    tensors: TargetTensors
    head: TargetHead
    generator: torch.Generator

    @property
    def config(self) -> Eagle3Config:
        return self.draft.config

    @property
    def kept(self) -> list[int] | None:
        return None if self.draft.kept_ids is None else self.draft.kept_ids.tolist()

    def document(self, length: int, *, supervised: float = 0.6) -> Document:
        shape = (length, len(self.config.aux_layers) + 1, self.config.hidden_size)
        g = self.generator
        return (
            torch.randint(0, self.config.vocab_size, (length,), generator=g),
            torch.rand(length, generator=g) < supervised,
            torch.randn(shape, generator=g, dtype=torch.float64),
        )

    def plan(self, batch: PackedBatch, ttt_length: int) -> TTTPlan:
        if self.draft.t2d is None:
            return make_plan(batch, ttt_length)
        choices = self.head.argmax(batch.last[scored_targets(batch)])
        return make_plan(batch, ttt_length, self.draft.t2d[choices])

    def run(
        self, documents: list[Document], weights: Tensor, num_trained: Tensor | None = None
    ) -> TTTOutput:
        batch = pack(documents)
        plan = self.plan(batch, len(weights))
        if num_trained is None:
            num_trained = plan.trained
        head = self.head.rows(self.draft.kept_ids)
        output: TTTOutput = self.draft(batch, head, plan, num_trained, weights)
        return output

    def gradients(self) -> dict[str, Tensor]:
        """Takes the gradients out of the draft."""
        found = {}
        for name, parameter in self.draft.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            found[name] = parameter.grad
            parameter.grad = None
        return found


def make_case(
    *,
    pruned: bool,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    options: ComputeOptions = DEFAULT_OPTIONS,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    config = make_config(draft_vocab=25 if pruned else 40)
    v, h = config.vocab_size, config.hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = TargetTensors(normal(v, h), 1 + 0.1 * normal(h), 0.3 * normal(v, h))
    kept = torch.randperm(v, generator=generator)[:25].sort().values if pruned else None
    draft = Eagle3Draft(config, tensors.embedding, kept, options).to(dtype)
    draft.initialize(tensors, seed)
    with torch.no_grad():  # away from the small initial weights, where much cancels
        for parameter in draft.parameters():
            noise = normal(*parameter.shape)
            parameter.add_(noise * (0.2 if parameter.dim() == 1 else 0.15))
    return Case(draft, tensors, TargetHead(tensors.norm, tensors.lm_head, EPS), generator)
