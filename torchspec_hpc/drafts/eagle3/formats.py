"""The two forms in which engines read an EAGLE-3 draft: names of tensors, and ``config.json``.

hf: one flat Llama configuration, which vLLM and SGLang both serve.
speculators: that of the library of this name (https://github.com/vllm-project/speculators), which
also names the target, so that ``vllm serve DRAFT`` needs nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torchspec_hpc.drafts.eagle3.config import Eagle3Config

DraftFormat = Literal["hf", "speculators"]

#: The version of speculators whose layout is written.
SPECULATORS_VERSION = "0.9.0"
#: How the decoder layer's tensors begin in each format; parameters are named as in hf.
_LAYER = {"hf": "midlayer.", "speculators": "layers.0."}
#: Variants of EAGLE-3 that both libraries know and :class:`Eagle3Draft` does not compute.
PLAIN_FLAGS = {
    "norm_before_residual": False,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
}


@dataclass(frozen=True)
class Served:
    """How a draft is meant to be served.

    Attributes:
        target: Directory or hub id of the target.
        architecture: Of the target, e.g. ``Qwen3ForCausalLM``.
        num_speculative_tokens: k, draft tokens proposed at a time.
    """

    target: str
    architecture: str
    num_speculative_tokens: int


def tensor_name(parameter: str, draft_format: DraftFormat) -> str:
    """What a format calls a parameter."""
    if not parameter.startswith(_LAYER["hf"]):
        return parameter
    return _LAYER[draft_format] + parameter.removeprefix(_LAYER["hf"])


def parameter_name(tensor: str) -> str:
    """The parameter that a tensor of either format is; inverse of :func:`tensor_name`."""
    for start in _LAYER.values():
        if tensor.startswith(start):
            return _LAYER["hf"] + tensor.removeprefix(start)
    return tensor


def config_json(
    config: Eagle3Config, dtype: str, draft_format: DraftFormat, served: Served
) -> dict[str, Any]:
    """Content of ``config.json``.

    Args:
        config: The draft's shape.
        dtype: Of the written weights.
        draft_format: Which of the two.
        served: What the speculators format says of serving it.
    """
    if draft_format == "speculators":
        return _speculators(config, dtype, served)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **_llama(config, dtype),
        "draft_vocab_size": config.draft_vocab_size,
        **PLAIN_FLAGS,
        # vLLM: the residual stream after l layers; SGLang adds one to what it reads
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.aux_layers],
            "use_aux_hidden_state": True,
        },
    }


def _speculators(config: Eagle3Config, dtype: str, served: Served) -> dict[str, Any]:
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": served.num_speculative_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": SPECULATORS_VERSION,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        "draft_vocab_size": config.draft_vocab_size,
        **PLAIN_FLAGS,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "transformer_layer_config": _llama(config, dtype),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": served.target, "architectures": [served.architecture]},
        },
    }


def _llama(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    scaling = None if rope.get("rope_type", "default") == "default" else dict(rope)
    if scaling:
        scaling.pop("rope_theta", None)
    return {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.hidden_act,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "num_aux_hidden_states": len(config.aux_layers),  # 3 to both engines if it is not said
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        # transformers 5 and newer engines read the first, older ones the other two
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
    }
