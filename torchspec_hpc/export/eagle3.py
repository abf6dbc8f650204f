"""Writes an EAGLE-3 draft as one directory that vLLM and SGLang both serve."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from torchspec_hpc.config.types import Dtype
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.contract import check_contract

logger = logging.getLogger(__name__)


def export_draft(checkpoint: DraftCheckpoint, output: Path, dtype: Dtype = "bfloat16") -> Path:
    """Exports a checkpoint.

    Args:
        checkpoint: The trained draft.
        output: Directory to write; must not exist. It appears whole or not at all.
        dtype: Of the written weights.

    Returns:
        `output`.

    Raises:
        ContractError: A tensor is missing, has another shape, or is not finite.
        UserError: `output` exists already, or cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} exists already", hint="give another directory, or remove it")
    config = draft_config(checkpoint)
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in checkpoint.tensors.items()}
    tensors |= vocabulary_map(config, checkpoint.kept_ids)
    check_contract(tensors, config)

    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            building / "model.safetensors",
            metadata={"format": "pt"},
        )
        text = json.dumps(config_json(config, dtype), indent=2)
        (building / "config.json").write_text(text + "\n", encoding="utf-8")
        building.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("exported step %s to %s", checkpoint.meta.step, output)
    return output


def draft_config(checkpoint: DraftCheckpoint) -> Eagle3Config:
    """The draft's shape as the checkpoint states it."""
    return Eagle3Config.from_dict(checkpoint.meta.draft["config"])


def vocabulary_map(config: Eagle3Config, kept_ids: Any) -> dict[str, torch.Tensor]:
    """``d2t``, offsets from draft rows to target ids, and ``t2d``, the kept ids as a mask."""
    rows = torch.arange(config.draft_vocab_size)
    kept = rows if kept_ids is None else torch.as_tensor(kept_ids, dtype=torch.int64)
    if kept.numel() != config.draft_vocab_size:
        raise UserError(
            f"{kept.numel()} kept token ids for a draft vocabulary of {config.draft_vocab_size}"
        )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return {"d2t": kept - rows, "t2d": t2d}


def config_json(config: Eagle3Config, dtype: Dtype) -> dict[str, Any]:
    """``config.json`` for both engines: what they spell differently is written twice."""
    rope = dict(config.rope_parameters)
    scaling = None if rope.get("rope_type", "default") == "default" else dict(rope)
    if scaling:
        scaling.pop("rope_theta", None)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
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
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "torch_dtype": dtype,
        # transformers 5 and newer engines read the first, older ones the other two
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        # vLLM: the residual stream after l layers; SGLang adds one to what it reads
        "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in config.aux_layers],
            "use_aux_hidden_state": True,
        },
    }
