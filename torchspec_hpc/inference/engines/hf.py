"""The Transformers engine: the reference for numbers, and for models that vLLM does not know."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchspec_hpc.drafts.rope import depends_on_length
from torchspec_hpc.inference.delivery import Delivery, Destination
from torchspec_hpc.inference.engines.base import (
    EngineContext,
    Finished,
    PromptRefused,
    check_prompt,
)
from torchspec_hpc.inference.engines.hf_target import HookedTarget
from torchspec_hpc.transfer.messages import Request

#: Tokens of one forward pass, padding included, when the configuration names none.
_DEFAULT_BATCH_TOKENS = 8192
#: Batches' worth of requests to hold, so that a batch can be made of similar lengths.
_BATCHES_AHEAD = 2


class HfEngine:
    """Captures with forward hooks on a Transformers model, in this process."""

    def __init__(self, context: EngineContext) -> None:
        inference = context.config.inference
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        # such targets scale their positions by the longest prompt of the batch
        by_length = depends_on_length(context.spec.rope_parameters)
        alone = inference.batch_invariant or by_length
        self._batch_prompts = 1 if alone else inference.inference_batch_size
        self._batch_tokens = inference.max_num_batched_tokens or _DEFAULT_BATCH_TOKENS
        self.max_prompts = _BATCHES_AHEAD * self._batch_prompts
        self.max_tokens = _BATCHES_AHEAD * self._batch_tokens
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        spread = context.device == "cuda" and inference.inference_num_gpus_per_engine > 1
        self._target = HookedTarget(
            context.config.model.target_model_path,
            layers=context.layers,
            dtype=getattr(torch, context.dtype),
            device="auto" if spread else context.device,
            attn_implementation=inference.hf.attn_implementation,
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
