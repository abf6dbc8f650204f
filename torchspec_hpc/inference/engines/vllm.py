"""The vLLM engine: unpatched vLLM, whose worker puts the states into the store itself."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch

from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import (
    Captured,
    EngineContext,
    EnginePrompt,
    Failed,
    Result,
    sift,
)
from torchspec_hpc.inference.engines.vllm_arguments import (
    capture_arguments,
    check_extra_args,
    environment,
    llm_arguments,
    max_prompts,
)
from torchspec_hpc.inference.engines.vllm_tracking import TRANSFER_PARAMS

logger = logging.getLogger(__name__)


class VllmEngine:
    """vLLM's offline engine, fed with token ids and asked for one token each."""

    def __init__(self, context: EngineContext) -> None:
        inference = context.config.inference
        os.environ.update(environment(context))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        import vllm  # takes seconds, and reads the environment

        from torchspec_hpc.inference.engines import vllm_compat

        if context.device != vllm_compat.DEVICE:
            raise ConfigError(
                f"inference.device is {context.device} and this vLLM is built for "
                f"{vllm_compat.DEVICE}",
                hint="install the other build of vLLM, or set inference.device",
            )
        # it warns, with a traceback, that there is no tokenizer to warm up
        logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
        check_extra_args(inference, {field.name for field in dataclasses.fields(vllm.EngineArgs)})
        arguments = {
            **llm_arguments(context),
            **capture_arguments(context),
            **inference.vllm.extra_args,
        }
        try:
            self._llm: Any = vllm.LLM(**arguments)
        except vllm_compat.REFUSALS as error:
            raise ConfigError(
                f"vLLM {vllm.__version__} refuses the target or its settings: {error}",
                hint="see model.* and inference.vllm.* in the configuration",
            ) from error
        self._sampling_params = vllm.SamplingParams
        self._refusals = vllm_compat.REFUSALS
        self.max_prompts = max_prompts(context)
        scheduler = self._llm.llm_engine.vllm_config.scheduler_config
        self.max_tokens = int(scheduler.max_num_batched_tokens)
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        logger.info("vLLM %s is ready: %s", vllm.__version__, arguments)

    def prefill(self, prompts: Sequence[EnginePrompt]) -> list[Result]:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        usable, results = sift(prompts, self._max_prompt_tokens, self._vocab_size)
        for start in range(0, len(usable), self.max_prompts):
            results.update(self._generate(usable[start : start + self.max_prompts]))
        for worker in self._llm.collective_rpc("take_capture_results"):
            results.update((item["key"], _result(item)) for item in worker)
        lost = "vLLM finished the prompt without capturing its states; see the engine's log"
        return [
            results.get(prompt.key) or Failed(prompt.key, lost, permanent=False)
            for prompt in prompts
        ]

    def close(self) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        self._llm.llm_engine.engine_core.shutdown()

    def _generate(self, prompts: Sequence[EnginePrompt]) -> dict[str, Result]:
        """Runs one batch; returns the prompts that vLLM refuses."""
        token_ids = [{"prompt_token_ids": prompt.token_ids.tolist()} for prompt in prompts]
        params = [
            self._sampling_params(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                extra_args={TRANSFER_PARAMS: {"key": prompt.key, "segment": prompt.segment}},
            )
            for prompt in prompts
        ]
        try:
            self._llm.generate(token_ids, params, use_tqdm=False)
        except self._refusals as error:  # for one prompt it refuses them all
            if len(prompts) > 1:
                return {k: v for prompt in prompts for k, v in self._generate([prompt]).items()}
            reason = f"vLLM refuses the prompt: {error}"
            return {prompts[0].key: Failed(prompts[0].key, reason, permanent=True)}
        return {}


def _result(item: dict[str, Any]) -> Result:
    if "reason" in item:
        return Failed(**item)
    return Captured(item["key"], tuple(item["shape"]), item["dtype"])
