"""Writes an EAGLE-3 draft as one directory that engines serve."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from torchspec_hpc.config.types import Dtype
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.contract import check_contract
from torchspec_hpc.drafts.eagle3.formats import DraftFormat, Served, config_json, tensor_name
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.card import model_card
from torchspec_hpc.export.checkpoint import DraftCheckpoint

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


@dataclass(frozen=True)
class ExportOptions:
    """How a draft is written.

    Attributes:
        draft_format: For whom.
        dtype: Of the written weights.
        served: What the card, and the speculators format, say of serving it.
        replace: Overwrite a draft that was exported to the same place before.
    """

    served: Served
    draft_format: DraftFormat = "hf"
    dtype: Dtype = "bfloat16"
    replace: bool = False


def export_draft(checkpoint: DraftCheckpoint, output: Path, options: ExportOptions) -> Path:
    """Exports a checkpoint.

    One tensor at a time is read and cast: what is held is the output, and one tensor in float32.

    Args:
        checkpoint: The trained draft.
        output: Directory to write. It appears whole or not at all.
        options: How.

    Returns:
        `output`.

    Raises:
        ContractError: A tensor is missing, has another shape, or is not finite.
        UserError: `output` exists already, or cannot be written.
    """
    _check_free(output, replace=options.replace)
    config = draft_config(checkpoint)
    dtype = getattr(torch, options.dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in checkpoint.tensors.items()}
    tensors |= vocabulary_map(config, checkpoint.kept_ids)
    check_contract(tensors, config, "nothing was written; check the checkpoint it came from")

    # the parent's name does not matter to a hidden neighbour: the rename stays on one disk
    building = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        building.mkdir(parents=True)
        _save(building, tensors, config, options)
        card = model_card(checkpoint, output.absolute(), options.served, options.draft_format)
        (building / CARD).write_text(card, encoding="utf-8")
        _put_in_place(building, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    logger.info("exported step %s to %s", checkpoint.meta.step, output)
    return output


def draft_config(checkpoint: DraftCheckpoint) -> Eagle3Config:
    """The draft's shape as the checkpoint states it."""
    return Eagle3Config.from_dict(checkpoint.meta.draft["config"])


def vocabulary_map(config: Eagle3Config, kept_ids: Any) -> dict[str, Tensor]:
    """``d2t``, offsets from draft rows to target ids, and ``t2d``, the kept ids as a mask.

    Nothing where the draft's vocabulary is the target's.
    """
    if kept_ids is None and config.draft_vocab_size == config.vocab_size:
        return {}
    rows = torch.arange(config.draft_vocab_size)
    kept = torch.as_tensor(kept_ids if kept_ids is not None else [], dtype=torch.int64)
    if kept.numel() != config.draft_vocab_size:
        raise UserError(
            f"{kept.numel()} kept token ids for a draft vocabulary of {config.draft_vocab_size}"
        )
    t2d = torch.zeros(config.vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return {"d2t": kept - rows, "t2d": t2d}


def _save(
    folder: Path, tensors: Mapping[str, Tensor], config: Eagle3Config, options: ExportOptions
) -> None:
    save_file(
        {tensor_name(name, options.draft_format): t.contiguous() for name, t in tensors.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    content = config_json(config, options.dtype, options.draft_format, options.served)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_free(output: Path, *, replace: bool) -> None:
    if not output.exists():
        return
    if not replace:
        raise UserError(
            f"{output} exists already", hint="give another directory, or --force to replace it"
        )
    strange = {path.name for path in output.iterdir()} - {WEIGHTS, CONFIG, CARD}
    if strange:
        raise UserError(
            f"{output} is not replaced: it also holds {', '.join(sorted(strange))}",
            allowed=f"a directory with nothing but {WEIGHTS}, {CONFIG} and {CARD}",
            hint="give another directory, or remove it yourself",
        )


def _put_in_place(building: Path, output: Path) -> None:
    """Gives the directory its name; an older one of this name goes away."""
    if output.exists():
        old = building.with_name(building.name + ".old")
        output.rename(old)
        building.rename(output)
        shutil.rmtree(old)
    else:
        building.rename(output)
