"""The Transformers engine: no dependency beyond the target's own code, slower than vLLM."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import (
    EngineContext,
    EnginePrompt,
    Result,
    sift,
)
from torchspec_hpc.inference.writer import StateWriter
from torchspec_hpc.transfer.store import HiddenStateStore

logger = logging.getLogger(__name__)

#: Tokens of one forward pass, padding included, when the configuration names none.
_DEFAULT_BATCH_TOKENS = 8192

TokenIds = npt.NDArray[np.int32]


class HfEngine:
    """Captures with forward hooks on a Transformers model, in this process."""

    def __init__(self, context: EngineContext) -> None:
        inference = context.config.inference
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        self.max_prompts = 1 if inference.batch_invariant else inference.inference_batch_size
        self.max_tokens = inference.max_num_batched_tokens or _DEFAULT_BATCH_TOKENS
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        self._target = HookedTarget(
            context.config.model.target_model_path,
            layers=context.layers,
            dtype=getattr(torch, context.dtype),
            device=context.device,
            trust_remote_code=context.config.model.trust_remote_code,
        )
        store = HiddenStateStore.open(
            context.config.mooncake,
            context.endpoints,
            segment_bytes=0,
            deadline_s=context.config.control.service_ready_s,
        )
        self._writer = StateWriter(store)

    def prefill(self, prompts: Sequence[EnginePrompt]) -> list[Result]:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        usable, results = sift(prompts, self._max_prompt_tokens, self._vocab_size)
        for batch in group_by_length(usable, self.max_prompts, self.max_tokens):
            captured = self._target.states([prompt.token_ids for prompt in batch])
            for prompt, states in zip(batch, captured, strict=True):
                self._writer.submit(prompt.key, prompt.segment, states)
        results.update((result.key, result) for result in self._writer.drain())
        return [results[prompt.key] for prompt in prompts]

    def close(self) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        self._writer.close()


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


def group_by_length(
    prompts: Sequence[EnginePrompt], max_prompts: int, max_tokens: int
) -> Iterator[list[EnginePrompt]]:
    """Groups prompts of similar length; a group has at most ``max_tokens`` with padding."""
    group: list[EnginePrompt] = []
    for prompt in sorted(prompts, key=lambda prompt: prompt.token_ids.size):
        # ascending, so the newest is the longest and every row is padded to it
        if group and (
            len(group) == max_prompts or (len(group) + 1) * prompt.token_ids.size > max_tokens
        ):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
