"""Shape of an EAGLE-3 draft."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec, read_rope_parameters

#: What a draft configuration file may change.
SHAPE_KEYS = (
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)
#: Rotary kinds that the engines' Llama drafts and transformers' Llama agree on.
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
)
_ROPE_KEYS = ("rope_parameters", "rope_theta", "rope_scaling")
#: Keys of a Hugging Face configuration that say nothing about the draft's computation.
_WITHOUT_EFFECT = (
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
    "pretraining_tp",
)


@dataclass(frozen=True)
class Eagle3Config:
    """Shape of an EAGLE-3 draft of Llama type, enough to build it without the target.

    Attributes:
        hidden_size: H, the target's: the draft reads the target's embedding.
        intermediate_size: Width of the MLP.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: V, the target's.
        draft_vocab_size: Rows of the draft's head; V if not pruned.
        aux_layers: Layers of the target whose outputs ``fc`` reads, ascending; layer ``l`` is
            the residual stream after ``l`` decoder layers.
        rms_norm_eps: Of all norms.
        max_position_embeddings: Longest sequence, in tokens.
        rope_parameters: In the spelling of transformers 5.
        hidden_act: The engines' Llama drafts know silu only.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigError(f"draft: {name} = {value!r} is no positive integer")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"draft: num_attention_heads = {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"draft: head_dim = {self.head_dim} is odd: RoPE rotates pairs")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"model.draft_vocab_size = {self.draft_vocab_size}",
                allowed=f"1 to {self.vocab_size}, the target's vocabulary",
            )
        _check_rope(self.rope_parameters)

    @classmethod
    def from_target(
        cls,
        spec: TargetSpec,
        aux_layers: tuple[int, ...],
        draft_vocab_size: int,
        overrides: dict[str, Any] | None = None,
    ) -> Eagle3Config:
        """Makes the draft's shape from the target's.

        Args:
            spec: The target.
            aux_layers: See :meth:`TargetSpec.aux_layers`.
            draft_vocab_size: Rows of the draft's head.
            overrides: Content of ``model.draft_model_config``: a Hugging Face style
                configuration, whose :data:`SHAPE_KEYS` replace what the target has.

        Raises:
            ConfigError: An unknown key, or one that contradicts the target or the algorithm.
        """
        shape = {key: getattr(spec, key) for key in SHAPE_KEYS}
        fixed: dict[str, Any] = {
            "hidden_size": spec.hidden_size,
            "vocab_size": spec.vocab_size,
            "draft_vocab_size": draft_vocab_size,
        }
        shape |= _read_overrides(overrides or {}, fixed)
        return cls(**fixed, **shape, aux_layers=tuple(aux_layers))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Eagle3Config:
        """Inverse of :meth:`to_dict`, also after a round trip through JSON."""
        return cls(**values | {"aux_layers": tuple(values["aux_layers"])})

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain values for JSON."""
        return dataclasses.asdict(self)


def _read_overrides(overrides: dict[str, Any], fixed: dict[str, Any]) -> dict[str, Any]:
    """Returns the shape keys of a draft configuration file; the other keys are checked."""
    if any(overrides.get(key) is not None for key in _ROPE_KEYS):
        overrides = overrides | {"rope_parameters": read_rope_parameters(overrides)}
    required = fixed | {
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
    }
    for key, value in overrides.items():
        if key in required and value != required[key]:
            raise ConfigError(
                f"model.draft_model_config: {key} = {value!r}",
                allowed=f"{required[key]!r}",
                hint="set model.draft_vocab_size" if key == "draft_vocab_size" else None,
            )
        if key not in (*required, *SHAPE_KEYS, *_ROPE_KEYS, *_WITHOUT_EFFECT):
            near = difflib.get_close_matches(key, SHAPE_KEYS, n=1)
            raise ConfigError(
                f"model.draft_model_config: unknown key {key}",
                allowed=", ".join(SHAPE_KEYS),
                hint=f"did you mean {near[0]}?" if near else None,
            )
    return {key: overrides[key] for key in SHAPE_KEYS if overrides.get(key) is not None}


def _check_rope(rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type")
    partial = rope.get("partial_rotary_factor", 1.0)
    if kind in ROPE_TYPES and "rope_theta" in rope and partial == 1.0:
        return
    raise ConfigError(
        f"draft: a Llama draft cannot use rope_parameters {rope}",
        allowed=f"rope_type one of {', '.join(ROPE_TYPES)}, with rope_theta, rotating whole heads",
        hint="give the draft rope_parameters of its own in model.draft_model_config",
    )
