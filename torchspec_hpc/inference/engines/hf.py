"""The Transformers engine: no dependency beyond the target's own code, slower than vLLM."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.delivery import Delivery, Destination
from torchspec_hpc.inference.engines.base import (
    EngineContext,
    Finished,
    PromptRefused,
    check_prompt,
)
from torchspec_hpc.transfer.messages import Request

logger = logging.getLogger(__name__)

#: Tokens of one forward pass, padding included, when the configuration names none.
_DEFAULT_BATCH_TOKENS = 8192
#: Batches' worth of requests to hold, so that a batch can be made of similar lengths.
_BATCHES_AHEAD = 2

TokenIds = npt.NDArray[np.int32]


class HfEngine:
    """Captures with forward hooks on a Transformers model, in this process."""

    def __init__(self, context: EngineContext) -> None:
        inference = context.config.inference
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        self._batch_prompts = 1 if inference.batch_invariant else inference.inference_batch_size
        self._batch_tokens = inference.max_num_batched_tokens or _DEFAULT_BATCH_TOKENS
        self.max_prompts = _BATCHES_AHEAD * self._batch_prompts
        self.max_tokens = _BATCHES_AHEAD * self._batch_tokens
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        self._target = HookedTarget(
            context.config.model.target_model_path,
            layers=context.layers,
            dtype=getattr(torch, context.dtype),
            device=context.device,
            trust_remote_code=context.config.model.trust_remote_code,
        )
        self._delivery = Delivery.open(context.config, context.run, context.endpoints, context.rank)
        self._open: list[Request] = []

    def admit(self, request: Request) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        check_prompt(request.tokens, self._max_prompt_tokens, self._vocab_size)
        if request.generation is not None:
            raise PromptRefused("the Transformers engine generates no answers")
        self._open.append(request)

    def step(self) -> list[Finished]:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        batch = choose_batch(self._open, self._batch_prompts, self._batch_tokens)
        captured = self._target.states([request.tokens for request in batch])
        for request, states in zip(batch, captured, strict=True):
            self._open.remove(request)
            self._delivery.submit(Destination.of(request), states)
        return [Finished(request) for request in batch]

    def close(self) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        self._delivery.close()


class HookedTarget:
    """A Transformers decoder that returns its residual stream after chosen layers.

    Args:
        path: Model directory or hub id.
        layers: Layer indices; ``l`` means after ``l`` layers, so 1 to the number of layers.
        dtype: Of weights and states.
        device: Where it runs.
        trust_remote_code: Whether code shipped with the model may run.

    Raises:
        ConfigError: Transformers cannot load the model, or its decoder layers are
            not where Llama-like models have them.
    """

    def __init__(
        self,
        path: str,
        *,
        layers: Sequence[int],
        dtype: torch.dtype,
        device: str,
        trust_remote_code: bool = False,
    ) -> None:
        try:
            # the bare decoder: no language-model head, whose logits nobody reads
            model = AutoModel.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Transformers cannot load model.target_model_path = {path}: {error}"
            ) from error
        decoder = getattr(model, "layers", None)
        if not isinstance(decoder, nn.ModuleList):
            raise ConfigError(
                f"{type(model).__name__} does not keep its decoder layers in .layers",
                allowed="Llama-like decoders",
                hint="set inference.engine=vllm",
            )
        self._model: Any = model.to(device).eval()
        self._device = device
        self._layers = tuple(layers)
        self._captured: dict[int, Tensor] = {}
        for index in set(self._layers):
            decoder[index - 1].register_forward_hook(self._keep(index))
        logger.info("loaded %s in %s on %s", type(model).__name__, dtype, device)

    def _keep(self, index: int) -> Any:
        # transformers 4 returns a tuple from a decoder layer, transformers 5 the tensor
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[index] = output[0] if isinstance(output, tuple) else output

        return hook

    @torch.inference_mode()
    def states(self, batch: Sequence[TokenIds]) -> list[Tensor]:
        """Runs one forward pass over prompts padded on the right.

        Padding comes after the last token of a prompt, where a causal model does
        not look, so it changes rows by rounding at most.

        Args:
            batch: Token ids, ``int32 [T_b]`` each.

        Returns:
            One tensor ``[T_b, len(layers), H]`` for each prompt, on the model's device.
        """
        longest = max(ids.size for ids in batch)
        token_ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, ids in enumerate(batch):
            token_ids[row, : ids.size] = torch.tensor(ids)  # a copy: requests are read only
            mask[row, : ids.size] = 1
        padded = bool((mask == 0).any())
        self._model(
            input_ids=token_ids.to(self._device),
            attention_mask=mask.to(self._device) if padded else None,
            use_cache=False,
        )
        stacked = torch.stack([self._captured[index] for index in self._layers], dim=2)
        self._captured.clear()
        return [stacked[row, : ids.size] for row, ids in enumerate(batch)]


def choose_batch(requests: Sequence[Request], max_prompts: int, max_tokens: int) -> list[Request]:
    """The oldest request, and those that are closest to it in length.

    Args:
        requests: Open ones, the oldest first; not empty.
        max_prompts: Most requests of a batch.
        max_tokens: Most tokens of a batch of several, padding included.
    """

    def length(request: Request) -> int:
        return len(request.token_ids)

    oldest, *others = requests
    longest, batch = len(oldest.tokens), [oldest]
    for request in sorted(others, key=lambda other: abs(length(other) - length(oldest))):
        padded = max(longest, len(request.tokens))
        if len(batch) < max_prompts and (len(batch) + 1) * padded <= max_tokens:
            longest = padded
            batch.append(request)
    return batch
