"""The three tensors of the target that the trainer needs: embedding, final norm, head."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.files import model_file
from torchspec_hpc.target.spec import TargetSpec

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TargetTensors:
    """Frozen weights of the target, on the CPU.

    Attributes:
        embedding: [V, H].
        norm: [H], what the final RMSNorm multiplies by; float32 or better.
        lm_head: [V, H]; the same object as ``embedding`` if the target ties them.
    """

    embedding: Tensor
    norm: Tensor
    lm_head: Tensor


def load_target_tensors(model: ModelConfig, spec: TargetSpec, dtype: torch.dtype) -> TargetTensors:
    """Loads embedding, final norm and head, and nothing else, from safetensors files.

    Args:
        model: Names the model and the three keys.
        spec: The model's shape, checked against what is found.
        dtype: Of embedding and head.

    Raises:
        ConfigError: No safetensors, a key is missing, or a shape or dtype is unusable.
    """
    checkpoint = _Checkpoint(model.target_model_path)
    v, h = spec.vocab_size, spec.hidden_size

    embedding = _embedding(checkpoint, model, spec).to(dtype)
    norm = checkpoint.load(model.norm_key, "model.norm_key", (h,))
    norm = norm.to(torch.promote_types(dtype, torch.float32)) + spec.norm_offset
    if spec.tie_word_embeddings and model.lm_head_key not in checkpoint.keys:
        return TargetTensors(embedding, norm, embedding)
    lm_head = checkpoint.load(model.lm_head_key, "model.lm_head_key", (v, h)).to(dtype)
    if spec.tie_word_embeddings:
        if not torch.equal(lm_head, embedding):
            raise ConfigError(
                f"{spec.path}: config.json ties the head to the embedding, but {model.lm_head_key} "
                f"is stored and differs from {model.embedding_key}",
                hint="vLLM would serve the embedding, transformers the stored head: set "
                "tie_word_embeddings to what is meant, or remove the tensor",
            )
        lm_head = embedding
    return TargetTensors(embedding, norm, lm_head)


def load_embedding(model: ModelConfig, spec: TargetSpec) -> Tensor:
    """Loads the embedding alone, [V, H] in its own dtype; arguments and errors as above."""
    return _embedding(_Checkpoint(model.target_model_path), model, spec)


def _embedding(checkpoint: _Checkpoint, model: ModelConfig, spec: TargetSpec) -> Tensor:
    shape = spec.vocab_size, spec.hidden_size
    return checkpoint.load(model.embedding_key, "model.embedding_key", shape)


class _Checkpoint:
    """A safetensors checkpoint, sharded or not; opens only the files it is asked for."""

    def __init__(self, model_path: str) -> None:
        self.model_path = model_path
        self._file_of = self._index()

    @property
    def keys(self) -> Iterable[str]:
        return self._file_of.keys()

    def load(self, key: str, setting: str, shape: tuple[int, ...]) -> Tensor:
        """Returns one tensor, checked; ``setting`` is the config key that names it."""
        if key not in self._file_of:
            near = difflib.get_close_matches(key, self._file_of, n=4, cutoff=0.4)
            tail = key.split(".")[-2:]
            near += [k for k in self._file_of if k.split(".")[-2:] == tail and k not in near]
            raise ConfigError(
                f"{self.model_path} has no tensor {key} ({setting})",
                allowed=f"one of its {len(self._file_of)} tensors; the nearest names are "
                f"{', '.join(near) or 'none'}",
                hint=f"set {setting}"
                + (
                    "; a head that is the embedding needs tie_word_embeddings: true in config.json"
                    if setting == "model.lm_head_key"
                    else ""
                ),
            )
        file = self._local(self._file_of[key])
        with safe_open(file, framework="pt") as tensors:
            tensor: Tensor = tensors.get_tensor(key)
        if tensor.shape != shape or tensor.dtype not in _PLAIN_DTYPES:
            raise ConfigError(
                f"{setting}: {key} of {self.model_path} is {list(tensor.shape)} {tensor.dtype}",
                allowed=f"{list(shape)} (from config.json), in float32, float16 or bfloat16",
                hint="quantised embeddings and heads cannot be used: take the original model"
                if tensor.shape == shape
                else f"set {setting}, or correct config.json",
            )
        return tensor

    def _index(self) -> dict[str, str]:
        """Maps each tensor's name to its file's name."""
        if (index := model_file(self.model_path, INDEX_FILE)) is not None:
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError) as error:
                raise ConfigError(f"cannot read {index}: {error!r}") from error
        if (file := model_file(self.model_path, SINGLE_FILE)) is not None:
            with safe_open(file, framework="pt") as tensors:
                return dict.fromkeys(tensors.keys(), SINGLE_FILE)
        raise ConfigError(
            f"{self.model_path} has neither {INDEX_FILE} nor {SINGLE_FILE}",
            allowed="a model in safetensors format",
            hint="load it with transformers and save_pretrained it: that writes safetensors",
        )

    def _local(self, name: str) -> Path:
        if (file := model_file(self.model_path, name)) is None:
            raise ConfigError(
                f"{self.model_path} has no {name}, which its {INDEX_FILE} names",
                hint="the download is incomplete: fetch the model again",
            )
        return file
