"""Cosines and sines are those of transformers, for every kind and in both spellings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from torchspec_hpc.drafts.rope import RotaryEmbedding, rotate
from torchspec_hpc.target.spec import TargetSpec

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
THETA = 5e5
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "long_factor": [1.0 + k for k in range(8)],
        "short_factor": [1.0 + 0.1 * k for k in range(8)],
    },
}


def spelled(kind: str, spelling: str) -> dict[str, Any]:
    rope = {"rope_type": kind, **KINDS[kind]}
    if spelling == "transformers 5":
        return {"rope_parameters": rope | {"rope_theta": THETA}}
    if spelling == "transformers 4":
        return {"rope_theta": THETA, "rope_scaling": None if kind == "default" else rope}
    rope["type"] = rope.pop("rope_type")
    return {"rope_theta": THETA, "rope_scaling": rope}


def rotary(kind: str, spelling: str = "transformers 5") -> RotaryEmbedding:
    spec = TargetSpec.from_dict("target", SHAPE | spelled(kind, spelling))
    return RotaryEmbedding(spec.rope_parameters, spec.head_dim, spec.max_position_embeddings)


def reference(kind: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own, from a fresh module: it keeps state of earlier lengths."""
    config = LlamaConfig(**SHAPE, **spelled(kind, "transformers 4"))
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("spelling", ["transformers 5", "transformers 4", "older"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, spelling: str) -> None:
    rope = rotary(kind, spelling)
    # lengths around the original and the present maximum, where some kinds change frequencies
    lengths = torch.tensor([5, 16, 17, 64, 65, 300])
    found = rope.frequencies(lengths)
    for length, frequencies in zip(lengths.tolist(), found, strict=True):
        positions = torch.arange(length)
        cos, sin = rope.cos_sin(positions, frequencies.expand(length, -1))
        expected_cos, expected_sin = reference(kind, positions)
        assert torch.equal(cos, expected_cos)
        assert torch.equal(sin, expected_sin)


def test_yarn_and_longrope_scale_attention() -> None:
    assert rotary("default").attention_scaling == 1.0
    assert rotary("yarn").attention_scaling == pytest.approx(0.1 * torch.log(torch.tensor(4.0)) + 1)
    assert rotary("longrope").attention_scaling > 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_does_not_change_its_neighbours(kind: str) -> None:
    rope = rotary(kind)
    alone = rope.frequencies(torch.tensor([10]))
    assert torch.equal(rope.frequencies(torch.tensor([10, 500]))[:1], alone)
    assert torch.equal(rope.frequencies(torch.tensor([10])), alone)


def test_rotates_as_transformers_does() -> None:
    positions = torch.arange(9)
    cos, sin = reference("llama3", positions)
    q, k = torch.randn(9, 4, 16), torch.randn(9, 2, 16)
    expected = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None]
    )
    for x, rotated in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotate(x, (cos, sin)), rotated[0].transpose(0, 1))
        assert rotate(x.bfloat16(), (cos, sin)).dtype == torch.bfloat16


def test_frequencies_exist_on_meta_and_are_not_rounded() -> None:
    with torch.device("meta"):
        rope = rotary("yarn")
    assert torch.equal(
        rope.frequencies(torch.tensor([4])), rotary("yarn").frequencies(torch.tensor([4]))
    )
