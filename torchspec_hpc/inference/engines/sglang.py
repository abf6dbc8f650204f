"""The SGLang engine: unpatched SGLang, whose scheduler puts the states into the store itself.

Two of SGLang's public arguments do it, both of 0.5.23: ``enable_return_aux_hidden_states`` has
the target keep the aux layers, and ``forward_hooks`` runs a hook of ours inside SGLang's own
processes (:mod:`torchspec_hpc.inference.engines.sglang_capture`).  SGLang's answer to
``return_hidden_states`` is not used: it sends every number as a Python float.

Not run on a GPU yet; its calls are checked against the interfaces of the 0.5.23 wheel.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Collection
from typing import Any

from torchspec_hpc.config.inference_schema import SglangConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.delivery import Destination
from torchspec_hpc.inference.engines.base import (
    EngineContext,
    Finished,
    PromptRefused,
    check_arguments,
    check_prompt,
)
from torchspec_hpc.inference.engines.sglang_capture import request_id
from torchspec_hpc.transfer.messages import Request

logger = logging.getLogger(__name__)

_HOOK_FACTORY = "torchspec_hpc.inference.engines.sglang_capture:capture_hook"
#: The final norm and what follows it, in models that wrap a language model, too.
_HOOKED = ("*model.norm", "*logits_processor")
#: SGLang generates at least one token.
_TOKENS_BEYOND_PROMPT = 1
#: SGLang's own default of ``chunked_prefill_size`` on large GPUs.
_DEFAULT_BATCH_TOKENS = 8192
#: Batches' worth of requests inside SGLang: one that runs, and one for when it has ended.
_BATCHES_AHEAD = 2

#: The only convention these know; those that know DFLASH count layers for EAGLE3 in various ways.
_EAGLE3_ONLY = frozenset(
    {
        "ApertusForCausalLM",
        "BailingMoeForCausalLM",
        "BailingMoeV2ForCausalLM",
        "ExaoneMoEForCausalLM",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
        "Glm4MoeForCausalLM",
        "Llama4ForConditionalGeneration",
        "LongcatFlashForCausalLM",
        "MiniMaxM2ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2MoeForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
    }
)
#: Arguments that are ours to set, and the key that sets them, if there is one.
_MANAGED = {
    "model_path": "model.target_model_path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "inference.dtype",
    "device": "inference.device",
    "context_length": "training.max_seq_length",
    "max_running_requests": "inference.inference_batch_size",
    "chunked_prefill_size": "inference.max_num_batched_tokens",
    "max_prefill_tokens": "inference.max_num_batched_tokens",
    "tp_size": "inference.sglang.tp_size",
    "mem_fraction_static": "inference.sglang.mem_fraction_static",
    "enable_deterministic_inference": "inference.batch_invariant",
    "skip_tokenizer_init": None,
    "disable_radix_cache": None,
    "disable_prefill_cuda_graph": None,
    "disable_decode_cuda_graph": None,
    "enable_return_aux_hidden_states": None,
    "return_aux_hidden_state_layer_ids": None,
    "speculative_algorithm": None,
    "forward_hooks": None,
    "pp_size": None,
    "dp_size": None,
}


class SglangEngine:
    """SGLang's offline engine, asked for one token a prompt."""

    def __init__(self, context: EngineContext) -> None:
        import sglang  # takes seconds

        sglang_config = context.config.inference.sglang
        arguments = engine_arguments(context)
        from sglang.srt.server_args import ServerArgs

        check_extra_args(sglang_config, inspect.signature(ServerArgs).parameters)
        try:
            self._engine: Any = sglang.Engine(**arguments, **sglang_config.extra_args)
        except ValueError as error:
            raise ConfigError(
                f"SGLang {sglang.__version__} refuses the target or its settings: {error}",
                hint="see model.* and inference.sglang.* in the configuration",
            ) from error
        self._loop: asyncio.AbstractEventLoop = self._engine.loop
        self._max_prompt_tokens = context.max_prompt_tokens
        self._vocab_size = context.spec.vocab_size
        self.max_prompts = _BATCHES_AHEAD * context.config.inference.inference_batch_size
        self.max_tokens = _BATCHES_AHEAD * arguments["chunked_prefill_size"]
        self._open: dict[asyncio.Task[Any], Request] = {}
        logger.info("SGLang %s is ready: %s", sglang.__version__, arguments)

    def admit(self, request: Request) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        check_prompt(request.tokens, self._max_prompt_tokens, self._vocab_size)
        if request.generation is not None:
            raise PromptRefused("the SGLang engine generates no answers")
        answer = self._engine.async_generate(
            input_ids=request.tokens.tolist(),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            rid=request_id(Destination.of(request), len(request.tokens)),
        )
        self._open[self._loop.create_task(answer)] = request

    def step(self) -> list[Finished]:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        first = asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
        done, _ = self._loop.run_until_complete(first)
        return [self._finished(task) for task in done]

    def close(self) -> None:
        """See :class:`~torchspec_hpc.inference.engines.base.Engine`."""
        self._engine.shutdown()

    def _finished(self, task: asyncio.Task[Any]) -> Finished:
        request = self._open.pop(task)
        try:
            task.result()
        except ValueError as error:  # how SGLang refuses a request
            return Finished(request, problem=f"SGLang refuses the prompt: {error}")
        return Finished(request)


def engine_arguments(context: EngineContext) -> dict[str, Any]:
    """Arguments of ``sglang.Engine``, but for the user's own."""
    config, inference = context.config, context.config.inference
    batch_tokens = inference.max_num_batched_tokens or _DEFAULT_BATCH_TOKENS
    arguments: dict[str, Any] = {
        "model_path": config.model.target_model_path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": context.dtype,
        "device": context.device,
        "context_length": context.max_prompt_tokens + _TOKENS_BEYOND_PROMPT,
        "max_running_requests": inference.inference_batch_size,
        "chunked_prefill_size": batch_tokens,
        "max_prefill_tokens": batch_tokens,
        "tp_size": inference.sglang.tp_size,
        "mem_fraction_static": inference.sglang.mem_fraction_static,
        "skip_tokenizer_init": True,
        # every row is computed in a pass that the hooks see: none comes from a cache or a graph
        "disable_radix_cache": True,
        "disable_prefill_cuda_graph": True,
        "disable_decode_cuda_graph": True,
        "enable_deterministic_inference": inference.batch_invariant,
        **_capture_arguments(context),
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _capture_arguments(context: EngineContext) -> dict[str, Any]:
    last = context.spec.num_layers
    aux = sorted(set(context.layers) - {last})
    hook = {
        "name": "torchspec_hpc",
        "target_modules": list(_HOOKED),
        "hook_factory": _HOOK_FACTORY,
        "config": {
            "run_dir": str(context.run.root),
            "rank": context.rank,
            "columns": [[*aux, last].index(layer) for layer in context.layers],
        },
    }
    method = "EAGLE3" if context.spec.architecture in _EAGLE3_ONLY else "DFLASH"
    if not aux:
        return {"forward_hooks": [hook]}
    return {
        "forward_hooks": [hook],
        "enable_return_aux_hidden_states": True,
        # with the line above it only names a convention, by which id i is after i + 1 layers
        "speculative_algorithm": method,
        "return_aux_hidden_state_layer_ids": [layer - 1 for layer in aux],
    }


def check_extra_args(sglang: SglangConfig, known: Collection[str]) -> None:
    """Refuses ``inference.sglang.extra_args`` that are ours to set, or that SGLang does not know.

    Args:
        sglang: The user's settings.
        known: Names that this SGLang knows.

    Raises:
        ConfigError: Names the argument, and the key that sets it or the nearest name.
    """
    check_arguments("SGLang", sglang.extra_args, _MANAGED, known)
    missing = sorted(set(_MANAGED) - set(known))
    if missing:
        raise ConfigError(
            f"this SGLang does not know {', '.join(missing)}",
            allowed="0.5.23, the version that this adapter was written for",
            hint="pip install sglang==0.5.23",
        )
