"""Rotary position embedding of every kind that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

#: Kinds whose frequencies change with the length of the sequence.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


def depends_on_length(rope_parameters: dict[str, Any]) -> bool:
    """Whether a model's positions are scaled by the length of the sequence."""
    return rope_parameters["rope_type"] in _LENGTH_DEPENDENT


class RotaryEmbedding:
    """Cosines and sines from transformers' own frequencies.

    Not a module: ``Module.to(bfloat16)`` would round the frequencies.  And without the state
    that transformers keeps for the kinds that depend on the sequence's length: there, a
    document's frequencies follow from its own length and from nothing it is packed with.

    Args:
        rope_parameters: ``rope_type``, ``rope_theta`` and what the type needs.
        head_dim: Width of a head.
        max_position_embeddings: Of the model, in tokens.
    """

    def __init__(
        self, rope_parameters: dict[str, Any], head_dim: int, max_position_embeddings: int
    ) -> None:
        scaling = {k: v for k, v in rope_parameters.items() if k != "rope_theta"}
        # transformers 4's spelling, which transformers 5 reads too
        self._config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=head_dim,
            max_position_embeddings=max_position_embeddings,
            rope_theta=float(rope_parameters["rope_theta"]),
            rope_scaling=scaling,
        )
        self._kind: str = rope_parameters["rope_type"]
        self._depends_on_length = depends_on_length(rope_parameters)
        with torch.device("cpu"):  # values, even where the model is built on meta
            rotary = LlamaRotaryEmbedding(self._config)
        self._frequencies: Tensor = rotary.inv_freq  # [head_dim/2] float32
        self.attention_scaling = float(rotary.attention_scaling)

    def frequencies(self, lengths: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Returns the inverse frequencies of documents, [D, head_dim/2] on ``device``.

        Args:
            lengths: [D], on the CPU.
            device: Where they are wanted.
        """
        if not self._depends_on_length:
            if self._frequencies.device != torch.device(device):  # once
                self._frequencies = self._frequencies.to(device)
            return self._frequencies.expand(len(lengths), -1)
        compute = ROPE_INIT_FUNCTIONS[self._kind]
        rows = [compute(self._config, torch.device("cpu"), seq_len=n)[0] for n in lengths.tolist()]
        return torch.stack(rows).to(device)

    def cos_sin(self, positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines, [N, head_dim] each, float32.

        Args:
            positions: [N].
            frequencies: [N, head_dim/2], of the document of each position.
        """
        angles = positions[:, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates heads [N, heads, head_dim] by cosines and sines [N, head_dim]; keeps the dtype."""
    cos, sin = (table[:, None] for table in cos_sin)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
