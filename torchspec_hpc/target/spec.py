"""The target model's shape, read from its ``config.json`` without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.files import model_file

#: transformers' default where a configuration names no ``rope_theta``.
DEFAULT_ROPE_THETA = 10000.0
#: Models of transformers whose final RMSNorm multiplies by 1 + weight.
_NORMS_AROUND_ONE = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "minimax_m3_vl_text",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "step3p5",
    "vaultgemma",
)


@dataclass(frozen=True)
class TargetSpec:
    """What the trainer, the engines and the exporter need to know of a target model.

    Attributes:
        path: Directory or hub id.
        architecture: First entry of ``architectures``, e.g. ``LlamaForCausalLM``.
        hidden_size: H.
        intermediate_size: Width of the MLP.
        num_layers: L, decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of a head.
        vocab_size: V.
        rms_norm_eps: Of the final norm.
        hidden_act: Activation of the MLP.
        max_position_embeddings: Longest sequence, in tokens.
        rope_parameters: In the spelling of transformers 5: ``rope_type``, ``rope_theta`` and
            what the type needs, whichever spelling the file has. Models whose layers differ
            have one such dictionary for each type of layer.
        tie_word_embeddings: The head is the embedding.
        dtype: Of the stored weights, e.g. ``bfloat16``.
        bos_token_id: None if the model has none.
        eos_token_ids: Empty if the model has none.
        norm_offset: The final norm multiplies by this plus the stored weight.
    """

    path: str
    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    hidden_act: str
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    norm_offset: float = 0.0

    @classmethod
    def from_path(cls, path: str) -> TargetSpec:
        """Reads ``config.json`` of a model directory or hub id.

        Raises:
            ConfigError: No such model, no readable ``config.json``, a key is missing, or the
                target's head computes something that this package does not.
        """
        file = model_file(path, "config.json")
        if file is None:
            raise ConfigError(
                f"model.target_model_path = {path} has no config.json",
                allowed="a model directory as transformers' save_pretrained writes it",
            )
        return cls.from_dict(path, _read_json(file))

    @classmethod
    def from_dict(cls, path: str, config: dict[str, Any]) -> TargetSpec:
        """Makes a spec of the content of ``config.json``; see :meth:`from_path`."""
        # multimodal models keep the language model's keys one level down
        text = _Keys(path, config, config.get("text_config") or {})
        _reject_unsupported_head(text)
        hidden_size = text.integer("hidden_size")
        num_heads = text.integer("num_attention_heads")
        eos = text.get("eos_token_id")
        return cls(
            path=path,
            architecture=(config.get("architectures") or ["unknown"])[0],
            hidden_size=hidden_size,
            intermediate_size=text.integer("intermediate_size"),
            num_layers=text.integer("num_hidden_layers"),
            num_attention_heads=num_heads,
            num_key_value_heads=text.integer("num_key_value_heads", default=num_heads),
            head_dim=text.integer("head_dim", default=hidden_size // num_heads),
            vocab_size=text.integer("vocab_size"),
            rms_norm_eps=float(text.require("rms_norm_eps")),
            hidden_act=text.get("hidden_act", "silu"),
            max_position_embeddings=text.integer("max_position_embeddings"),
            rope_parameters=read_rope_parameters(text.values),
            tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
            dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
            bos_token_id=text.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            norm_offset=1.0 if text.get("model_type") in _NORMS_AROUND_ONE else 0.0,
        )

    def aux_layers(self, configured: tuple[int, ...] | None) -> tuple[int, ...]:
        """Returns the layers whose output the draft is fed with, ascending.

        Layer ``l`` is the residual stream after ``l`` decoder layers, so L is the last one.

        Args:
            configured: ``inference.aux_hidden_states_layers``; None: ``(2, L//2, L-3)``.

        Raises:
            ConfigError: Not unique, not ascending or not in ``[1, L]``.
        """
        layers = configured
        if layers is None:
            layers = (2, self.num_layers // 2, self.num_layers - 3)
        if (
            layers
            and list(layers) == sorted(set(layers))
            and layers[0] >= 1
            and layers[-1] <= self.num_layers
        ):
            return layers
        source = "configured" if configured is not None else "the default (2, L//2, L-3) gives"
        raise ConfigError(
            f"inference.aux_hidden_states_layers: {source} {list(layers)}, which does not fit "
            f"the {self.num_layers} layers of {self.path}",
            allowed=f"different layers, ascending, from 1 to {self.num_layers}",
            hint=f"set inference.aux_hidden_states_layers, for instance to {self._spread()}",
        )

    def states_dtype(self, configured: str, device_type: str) -> str:
        """Returns the dtype of the target's weights in an engine, and of its hidden states.

        Args:
            configured: ``inference.dtype``.  ``auto`` is the target's own on a GPU and float32 on
                a CPU, where products in bfloat16 are up to 300 times slower than in float32.
            device_type: Where the engine computes: ``cuda`` or ``cpu``.
        """
        if configured != "auto":
            return configured
        return "float32" if device_type == "cpu" else self.dtype

    def _spread(self) -> list[int]:
        """Up to three layers, evenly spread below the last one where there is room."""
        top = max(1, self.num_layers - 1) if self.num_layers != 3 else 3
        return sorted({max(1, round(top * share / 3)) for share in (1, 2, 3)})


class _Keys:
    """The keys of ``config.json``: the language model's first, the outer ones second."""

    def __init__(self, path: str, outer: dict[str, Any], inner: dict[str, Any]) -> None:
        self.path = path
        self.values = outer | inner

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def require(self, key: str) -> Any:
        if (value := self.get(key)) is None:
            raise ConfigError(
                f"config.json of {self.path} has no {key}",
                allowed="decoder-only models of the Llama family: RMSNorm, RoPE, a linear head",
            )
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.require(key) if default is None else self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"config.json of {self.path}: {key} = {value!r} is no positive integer"
            )
        return value


def read_rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``rope_parameters`` as transformers 5 spells them.

    Args:
        config: Content of a ``config.json``: with ``rope_parameters``, or with ``rope_theta``
            and ``rope_scaling`` as transformers 4 spells them.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return rope  # one set for each type of layer
    old_type = rope.pop("type", None)  # the oldest spelling of rope_type
    rope.setdefault("rope_type", old_type or "default")
    rope.setdefault("rope_theta", config.get("rope_theta") or DEFAULT_ROPE_THETA)
    if (partial := config.get("partial_rotary_factor")) is not None:
        rope.setdefault("partial_rotary_factor", partial)
    return rope


def _reject_unsupported_head(text: _Keys) -> None:
    """The trainer computes ``lm_head(rms_norm(h))``; some models do more than that."""
    neutral = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}
    for key, plain in neutral.items():
        if (value := text.get(key, plain)) != plain:
            raise ConfigError(
                f"config.json of {text.path} has {key} = {value}: its logits are not "
                "lm_head(rms_norm(h)), and a draft would be trained for another distribution",
                allowed="targets whose logits are lm_head(rms_norm(h))",
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds a {type(config).__name__}, not an object")
    return config
