"""From a published draft, of ours or of others, back to what :class:`Eagle3Draft` is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchspec_hpc.drafts.eagle3.config import SHAPE_KEYS, Eagle3Config
from torchspec_hpc.drafts.eagle3.contract import check_contract
from torchspec_hpc.drafts.eagle3.formats import PLAIN_FLAGS, parameter_name
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec, read_rope_parameters

#: What the published configuration must say if it says anything.
_REQUIRED: dict[str, Any] = {
    "model_type": "llama",
    "speculators_model_type": "eagle3",
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "bias": False,
    "logit_scale": 1.0,
    "use_aux_norm": False,
    **PLAIN_FLAGS,
}
#: Frozen, and the target's: published or not.
EMBEDDING = "embed_tokens.weight"
_AUX_KEY = "eagle_aux_hidden_state_layer_ids"


def adopted_config(
    content: Mapping[str, Any], spec: TargetSpec, aux_layers: tuple[int, ...]
) -> Eagle3Config:
    """The shape of a published draft.

    Args:
        content: Of its ``config.json``, in either format.
        spec: The target it is to be trained for.
        aux_layers: Whose states the run captures.

    Raises:
        ConfigError: It is another kind of draft, or made for another target or other layers.
    """
    layer = content.get("transformer_layer_config")
    values = {**(layer or {}), **content}
    if layer is not None:
        # vLLM serves a speculators draft that does not say it with the norm before
        values.setdefault("norm_before_residual", True)
    found = [
        f"{key} = {values[key]!r}, not {wanted!r}"
        for key, wanted in _REQUIRED.items()
        if values.get(key) is not None and values[key] != wanted
    ]
    found += [
        f"{key} = {values.get(key)!r}, the target's is {getattr(spec, key)}"
        for key in ("hidden_size", "vocab_size")
        if values.get(key) != getattr(spec, key)
    ]
    if values.get("target_hidden_size") not in (None, spec.hidden_size):
        found.append(f"target_hidden_size = {values['target_hidden_size']}, not {spec.hidden_size}")
    if found:
        raise ConfigError(
            "the published draft is none that can be trained for this target: " + "; ".join(found),
            allowed="EAGLE-3 drafts of Llama type with one layer, made for this target",
        )
    _check_layers(values, spec, aux_layers)
    missing = [key for key in SHAPE_KEYS if key != "rope_parameters" and values.get(key) is None]
    if "head_dim" in missing and values.get("num_attention_heads"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        missing.remove("head_dim")
    if missing:
        raise ConfigError(f"config.json of the published draft has no {', '.join(missing)}")
    return Eagle3Config(
        **{key: values[key] for key in SHAPE_KEYS if key != "rope_parameters"},
        hidden_size=spec.hidden_size,
        vocab_size=spec.vocab_size,
        draft_vocab_size=values.get("draft_vocab_size") or spec.vocab_size,
        aux_layers=aux_layers,
        rope_parameters=read_rope_parameters(values),
    )


def _check_layers(values: Mapping[str, Any], spec: TargetSpec, aux_layers: tuple[int, ...]) -> None:
    """Compares the layers that ``fc`` reads; who wrote them decides how they count."""
    if (own := values.get(_AUX_KEY)) is not None:
        readings = [tuple(own)]
    elif (ids := (values.get("eagle_config") or {}).get(_AUX_KEY)) is not None:
        # SGLang, and what was trained for it, adds one; vLLM does not: the run has to say it
        readings = [tuple(layer + 1 for layer in ids), tuple(ids)]
    else:
        readings = [spec.aux_layers(None)]  # the default of both engines
    if aux_layers not in readings:
        raise ConfigError(
            f"the published draft reads other layers of the target than {list(aux_layers)}",
            allowed=" or ".join(str(list(layers)) for layers in readings)
            + (" (as SGLang counts, or as vLLM does)" if len(readings) > 1 else ""),
            hint="set inference.aux_hidden_states_layers",
        )


def adopted_weights(
    tensors: Mapping[str, Tensor], config: Eagle3Config, embedding: Callable[[], Tensor]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The parameters of a published draft and the tokens its head can say.

    Args:
        tensors: As they are stored, in either format.
        config: Of :func:`adopted_config`.
        embedding: Loads the target's, [V, H]; asked only where the draft brings one.

    Returns:
        float32 weights by the name of the parameter; ascending target ids [V_draft], None if the
        head has all of the target's.

    Raises:
        ContractError: Names, shapes or values are not those of such a draft.
        ConfigError: It has an embedding of its own.
    """
    named = {parameter_name(name): tensor for name, tensor in tensors.items()}
    own = named.pop(EMBEDDING, None)
    if own is not None and not _is_same(own, embedding()):
        raise ConfigError(
            "the published draft has an embedding of its own",
            allowed="drafts that read the target's: only that is kept here",
        )
    rows = torch.arange(config.draft_vocab_size)
    is_full = config.draft_vocab_size == config.vocab_size
    if is_full and not named.get("d2t", torch.zeros(1)).any():  # it says nothing
        named.pop("d2t", None)
        named.pop("t2d", None)
    if "d2t" in named and "t2d" not in named:  # follows from d2t; the engines do not read it
        named["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
        named["t2d"][(rows + named["d2t"]).clamp(0, config.vocab_size - 1)] = True
    check_contract(named, config, "take another draft, or train one from the beginning")
    kept = None if is_full else rows + named.pop("d2t")
    named.pop("t2d", None)
    return {name: tensor.float() for name, tensor in named.items()}, kept


def _is_same(own: Tensor, embedding: Tensor) -> bool:
    """Equal but for the rounding of another dtype."""
    if own.shape != embedding.shape:
        return False
    return torch.allclose(own.float(), embedding.float(), rtol=1e-2, atol=1e-3)
