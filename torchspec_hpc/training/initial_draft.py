"""A published draft as the beginning of a run: ``model.initial_draft``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.drafts.eagle3.adopt import adopted_config, adopted_weights
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.errors import ConfigError, UserError
from torchspec_hpc.target.files import model_file
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import load_embedding

_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class InitialDraft:
    """What a run takes from a published draft.

    Attributes:
        config: Its shape.
        weights: float32, by the name of the parameter.
        kept_ids: Ascending target ids of its head, int64 [V_draft]; None: all of the target's.
    """

    config: Eagle3Config
    weights: dict[str, Tensor]
    kept_ids: Tensor | None

    @torch.no_grad()
    def copy_to(self, draft: nn.Module) -> None:
        """Sets every parameter of a draft of this shape."""
        for name, parameter in draft.named_parameters():
            parameter.copy_(self.weights[name])


def load_initial_draft(
    model: ModelConfig, spec: TargetSpec, aux_layers: tuple[int, ...]
) -> InitialDraft | None:
    """Reads ``model.initial_draft``; None where there is none.

    Raises:
        ConfigError: It is missing, or none that can be trained for this target with this
            configuration.
    """
    if model.initial_draft is None:
        return None
    try:
        return _load(model, model.initial_draft, spec, aux_layers)
    except UserError as error:
        raise ConfigError(
            f"model.initial_draft = {model.initial_draft}: {error.what}",
            allowed=error.allowed,
            hint=error.hint,
        ) from error


def _load(
    model: ModelConfig, path: str, spec: TargetSpec, aux_layers: tuple[int, ...]
) -> InitialDraft:
    content = _read_config(path)
    config = adopted_config(content, spec, aux_layers)
    asked = model.draft_vocab_size or spec.vocab_size
    if config.draft_vocab_size != asked:
        raise ConfigError(
            f"its head has {config.draft_vocab_size} tokens, model.draft_vocab_size asks for "
            f"{asked}",
            hint="set model.draft_vocab_size to what it has; null if that is the target's "
            f"{spec.vocab_size}",
        )
    embedding = partial(load_embedding, model, spec)
    weights, kept_ids = adopted_weights(_read_tensors(path), config, embedding)
    return InitialDraft(config, weights, kept_ids)


def _read_config(path: str) -> dict[str, Any]:
    file = model_file(path, "config.json", setting="model.initial_draft")
    if file is None:
        raise ConfigError("it has no config.json", allowed="a draft that engines serve")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _read_tensors(path: str) -> dict[str, Tensor]:
    for name in _FILES:
        file = model_file(path, name, setting="model.initial_draft")
        if file is not None:
            return _read_file(file)
    raise ConfigError(f"it has neither {' nor '.join(_FILES)}", allowed="weights in one file")


def _read_file(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            tensors: dict[str, Tensor] = load_file(file)
            return tensors
        loaded: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    return loaded
