"""A Transformers model that tells its residual stream after chosen layers."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from torchspec_hpc.errors import ConfigError

logger = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.int32]


class HookedTarget:
    """The decoder of a model, with a hook on each layer whose output is wanted.

    What it does not need stays unused: heads, and the towers of multimodal models.

    Args:
        path: Model directory or hub id.
        layers: Layer indices; ``l`` means after ``l`` layers, so 1 to the number of layers.
        dtype: Of weights and states.
        device: Where it runs; ``auto`` spreads the layers over all visible GPUs.
        attn_implementation: As Transformers names it; None leaves the choice to it.
        trust_remote_code: Whether code shipped with the model may run.

    Raises:
        ConfigError: Transformers cannot load the model that way, or its decoder cannot be found.
    """

    def __init__(
        self,
        path: str,
        *,
        layers: Sequence[int],
        dtype: torch.dtype,
        device: str,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        if device == "auto":
            _require_accelerate()
            options["device_map"] = "auto"
        model = _load(path, options)
        if device == "auto":
            # there is none where one device holds everything
            require_on_gpus(getattr(model, "hf_device_map", {}))
        else:
            model.to(device)
        owner, name = find_decoder(model)
        self._decoder: Any = owner.eval()
        self._columns: dict[int, list[int]] = {}
        for column, index in enumerate(layers):
            self._columns.setdefault(index, []).append(column)
        self._width = len(layers)
        self._captured: Tensor | None = None
        for index in self._columns:
            getattr(owner, name)[index - 1].register_forward_hook(self._keep(index))
        self._device = next(owner.parameters()).device  # of the embedding
        logger.info("loaded %s in %s on %s", type(model).__name__, dtype, _devices(owner))

    @torch.inference_mode()
    def states(self, batch: Sequence[TokenIds]) -> list[Tensor]:
        """Runs one forward pass over prompts padded on the right.

        Padding comes after the last token of a prompt, where a causal model does
        not look, so it changes rows by rounding at most.

        Args:
            batch: Token ids, ``int32 [T_b]`` each.

        Returns:
            One tensor ``[T_b, len(layers), H]`` for each prompt, where the first layer is.
        """
        longest = max(ids.size for ids in batch)
        token_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, ids in enumerate(batch):
            token_ids[row, : ids.size] = torch.tensor(ids)  # a copy: requests are read only
            mask[row, : ids.size] = 1
        padded = bool((mask == 0).any())
        self._decoder(
            input_ids=token_ids.to(self._device),
            attention_mask=mask.to(self._device) if padded else None,
            use_cache=False,
        )
        captured, self._captured = self._captured, None
        assert captured is not None
        return [captured[row, : ids.size] for row, ids in enumerate(batch)]

    def _keep(self, index: int) -> Any:
        """A hook that copies a layer's output [B, T, H] to its place in [B, T, len(layers), H].

        The output itself is free again at once: no more is held than what is returned.
        """

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # transformers 4 returns a tuple from a decoder layer, transformers 5 the tensor
            states: Tensor = output[0] if isinstance(output, tuple) else output
            if self._captured is None:
                *batch, hidden_size = states.shape
                shape = (*batch, self._width, hidden_size)
                self._captured = torch.empty(shape, dtype=states.dtype, device=self._device)
            for column in self._columns[index]:
                self._captured[:, :, column] = states

        return hook


def find_decoder(model: nn.Module) -> tuple[nn.Module, str]:
    """Finds the decoder layers of a model, however it wraps them.

    They are the list of modules that is as long as the language model has layers: ``layers`` of a
    Llama, ``language_model.layers`` of a model that also sees.

    Returns:
        The module that owns the list, which turns token ids into hidden states, and its attribute.

    Raises:
        ConfigError: There is no such list, or more than one.
    """
    config: Any = model.config
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    lists = {name: x for name, x in model.named_modules() if isinstance(x, nn.ModuleList)}
    found = [
        name
        for name, modules in lists.items()
        # a vision tower may happen to have as many layers
        if len(modules) == num_layers and _takes_token_ids(model, name)
    ]
    if len(found) != 1:
        raise ConfigError(
            f"cannot tell the decoder layers of {type(model).__name__}: its lists of modules are "
            f"{ {name: len(modules) for name, modules in lists.items()} }",
            allowed=f"one list of {num_layers} layers (num_hidden_layers) in a module that has "
            "the embedding of the token ids",
            hint="set inference.engine=vllm",
        )
    parent, _, name = found[0].rpartition(".")
    return model.get_submodule(parent), name


def _takes_token_ids(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, nn.Embedding) for child in owner.children())


def _load(path: str, options: dict[str, Any]) -> Any:
    try:
        # the bare decoder: no language-model head, whose logits nobody reads
        return AutoModel.from_pretrained(path, **options)
    except ImportError as error:  # flash_attention_2 without flash-attn, or remote code's imports
        raise ConfigError(
            f"Transformers needs a package to load model.target_model_path = {path}: {error}",
            hint="install it, or set inference.hf.attn_implementation=sdpa",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Transformers cannot load model.target_model_path = {path}: {error}"
        ) from error


def _require_accelerate() -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigError(
            "inference.engine is hf with inference_num_gpus_per_engine > 1, and the package "
            "accelerate, which spreads the layers over the GPUs, is not installed",
            hint="pip install accelerate, or use one GPU for each engine",
        )


def require_on_gpus(device_map: Mapping[str, object]) -> None:
    """Refuses what accelerate does with a target that is too large, in silence.

    Args:
        device_map: Where each module is.

    Raises:
        ConfigError: There are GPUs, and some modules are not on them.
    """
    elsewhere = [name for name, place in device_map.items() if place in ("cpu", "disk")]
    if elsewhere and torch.cuda.is_available():
        raise ConfigError(
            f"the target does not fit on the {torch.cuda.device_count()} GPUs of an engine: "
            f"{len(elsewhere)} of its modules would be loaded for each batch anew",
            hint="raise inference.inference_num_gpus_per_engine",
        )


def _devices(module: nn.Module) -> str:
    return ", ".join(sorted({str(parameter.device) for parameter in module.parameters()}))
