"""The draft of a run, equal on any number of ranks, and the target's head beside it."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchspec_hpc.config import Config
from torchspec_hpc.config.rundir import KEPT_IDS
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.model import ComputeOptions, Eagle3Draft
from torchspec_hpc.drafts.losses import LossMix
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import TargetTensors, load_target_tensors
from torchspec_hpc.training.initial_draft import InitialDraft
from torchspec_hpc.training.parallel import World, shard

logger = logging.getLogger(__name__)


class BuiltDraft(NamedTuple):
    """A draft that is ready to train.

    Attributes:
        draft: On the rank's device, sharded, with float32 parameters.
        head: The target's norm and head, on the rank's device.
        description: What a checkpoint says of the draft.
    """

    draft: Eagle3Draft
    head: TargetHead
    description: dict[str, object]


def build_draft(
    config: Config,
    world: World,
    spec: TargetSpec,
    aux_layers: tuple[int, ...],
    kept_ids: Tensor | None,
    initial: InitialDraft | None = None,
) -> BuiltDraft:
    """Builds the draft with its first weights; every rank calls it.

    Args:
        config: Of the run.
        world: The training group.
        spec: The target.
        aux_layers: See :meth:`TargetSpec.aux_layers`.
        kept_ids: Ascending target ids of the draft's vocabulary; None: the target's.
        initial: Published draft to begin with.

    Raises:
        ConfigError: The draft's shape or the target's tensors cannot be used.
    """
    settings = config.training
    draft_config = (
        initial.config
        if initial is not None
        else Eagle3Config.from_target(
            spec,
            aux_layers,
            spec.vocab_size if kept_ids is None else len(kept_ids),
            _read_overrides(config.model.draft_model_config),
        )
    )
    loaded = load_target_tensors(config.model, spec, getattr(torch, settings.compute_dtype))
    target = _on_device(loaded, world.device)
    options = compute_options(settings, world.device)
    draft = Eagle3Draft(draft_config, target.embedding, kept_ids, options)
    if initial is not None:
        initial.copy_to(draft)
        logger.info("weights taken from %s", config.model.initial_draft)
    else:
        draft.initialize(target, settings.seed)
    draft.lm_head.requires_grad_(not settings.freeze_lm_head)
    shard(draft.to(world.device), world, settings)
    num_parameters = sum(parameter.numel() for parameter in draft.parameters())
    logger.info("draft of %.1f M parameters over %d ranks", num_parameters / 1e6, world.size)
    description: dict[str, object] = {
        "algorithm": config.model.draft_algorithm,
        "config": draft_config.to_dict(),
        "kept_ids_file": None if kept_ids is None else KEPT_IDS,
        "freeze_lm_head": settings.freeze_lm_head,
    }
    return BuiltDraft(
        draft, TargetHead(target.norm, target.lm_head, spec.rms_norm_eps), description
    )


def compute_options(settings: TrainingConfig, device: torch.device) -> ComputeOptions:
    """How the draft's training step is computed.

    Raises:
        ConfigError: The attention back end does not work on the device, or in this precision.
    """
    _check_backend(settings, device)
    loss, compile_ = settings.loss_type, settings.torch_compile
    weights = {loss: 1.0} if isinstance(loss, str) else loss
    return ComputeOptions(
        attention_backend=settings.attention_backend,
        loss=LossMix(tuple(weights.items()), settings.kl_decay),
        gradient_checkpointing=settings.gradient_checkpointing,
        compiled=device.type == "cuda" if compile_ == "auto" else compile_,
        loss_chunk_bytes=settings.loss_chunk_mib and settings.loss_chunk_mib * 2**20,
    )


def _check_backend(settings: TrainingConfig, device: torch.device) -> None:
    backend = settings.attention_backend
    works = {
        "sdpa": device.type == "cpu" and settings.compute_dtype == "float32",
        "flash": device.type == "cuda" and settings.compute_dtype != "float32",
        "flash_attn": device.type == "cuda" and settings.compute_dtype != "float32",
        "flex_attention": device.type == "cuda",
    }
    if not works.get(backend, True):
        allowed = ["auto", *(name for name, fits in works.items() if fits), "plain"]
        raise ConfigError(
            f"training.attention_backend = {backend} does not work on {device.type} with "
            f"training.compute_dtype = {settings.compute_dtype}",
            allowed=", ".join(allowed),
            hint="leave it at auto",
        )
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "training.attention_backend = flash_attn needs the package flash-attn",
            hint="pip install 'torchspec_hpc[fa]', or use flash, which comes with PyTorch",
        )


def _on_device(target: TargetTensors, device: torch.device) -> TargetTensors:
    """Moves the target's tensors; tied ones stay one tensor."""
    embedding = target.embedding.to(device)
    tied = target.lm_head is target.embedding
    lm_head = embedding if tied else target.lm_head.to(device)
    return TargetTensors(embedding, target.norm.to(device), lm_head)


def _read_overrides(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"model.draft_model_config: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model.draft_model_config: {path} holds a {type(content).__name__}")
    return content
