"""A tiny draft, its target head and batches of random hidden states."""

from __future__ import annotations

import torch

from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.target.weights import TargetTensors

VOCAB, HIDDEN, DRAFT_VOCAB = 40, 16, 24
CONFIG = Eagle3Config(
    hidden_size=HIDDEN,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=VOCAB,
    draft_vocab_size=DRAFT_VOCAB,
    aux_layers=(1, 2),
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


def training_config(**values: object) -> TrainingConfig:
    settings = {"device": "cpu", "compute_dtype": "float32", "ttt_length": 3, "num_threads": 1}
    return TrainingConfig.model_validate(settings | values)


def target() -> TargetTensors:
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    return TargetTensors(embedding, torch.ones(HIDDEN), embedding * 2)


def draft() -> Eagle3Draft:
    kept = torch.arange(0, DRAFT_VOCAB) + VOCAB - DRAFT_VOCAB
    made = Eagle3Draft(CONFIG, target().embedding, kept)
    made.initialize(target(), seed=0)
    return made


def meta(world_size: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=0,
        cursor=0,
        draft={"algorithm": "eagle3", "config": CONFIG.to_dict(), "kept_ids_file": None},
        target="/models/tiny",
        stream={"dataset": "abc", "num_samples": 6, "seed": 0, "shuffle": True},
        world_size=world_size,
    )


def head() -> TargetHead:
    return TargetHead(target().norm, target().lm_head, CONFIG.rms_norm_eps)


def document(index: int, mask_from: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A random document; with `mask_from` beyond its end nothing in it is supervised."""
    generator = torch.Generator().manual_seed(100 + index)
    length = 7 + index % 5
    ids = torch.randint(VOCAB, (length,), generator=generator)
    states = torch.randn(length, len(CONFIG.aux_layers) + 1, HIDDEN, generator=generator)
    return ids, torch.arange(length) >= mask_from, states


def batches(micro_batches: list[list[int]], empty: tuple[int, ...] = ()) -> list[PackedBatch]:
    return [
        pack([document(i, 99 if i in empty else 4) for i in documents])
        for documents in micro_batches
    ]
