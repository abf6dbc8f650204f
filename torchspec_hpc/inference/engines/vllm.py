"""The vLLM engine: unpatched vLLM, whose worker puts the states into the store itself."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Collection, Sequence
from typing import Any

import torch

from torchspec_hpc.config.schema import InferenceConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import (
    Captured,
    EngineContext,
    EnginePrompt,
    Failed,
    Result,
    sift,
)
from torchspec_hpc.inference.engines.vllm_tracking import TRANSFER_PARAMS

_logger = logging.getLogger(__name__)

_CONNECTOR_MODULE = "torchspec_hpc.inference.engines.vllm_connector"
_CPU_KV_CACHE_BYTES = 1 << 30
#: vLLM takes prompts shorter than its maximum only (one token is always generated),
#: and captures nothing when there is no room for the one "draft" token after that.
_TOKENS_BEYOND_PROMPT = 2

#: Arguments that are ours to set, and the key that sets them, if there is one.
_MANAGED = {
    "model": "model.target_model_path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "inference.dtype",
    "max_model_len": "training.max_seq_length",
    "max_num_seqs": "inference.inference_batch_size",
    "max_num_batched_tokens": "inference.vllm.max_num_batched_tokens",
    "tensor_parallel_size": "inference.vllm.tp_size",
    "gpu_memory_utilization": "inference.vllm.mem_fraction_static",
    "kv_cache_memory_bytes": "inference.vllm.kv_cache_bytes",
    "enforce_eager": "inference.vllm.enforce_eager",
    "skip_tokenizer_init": None,
    "speculative_config": None,
    "kv_transfer_config": None,
    "worker_extension_cls": None,
}


class VllmEngine:
    """vLLM's offline engine, fed with token ids and asked for one token each."""

    def __init__(self, context: EngineContext) -> None:
        config = context.config
        inference = config.inference
        os.environ.update(environment(context))
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
        if inference.num_threads is not None:
            torch.set_num_threads(inference.num_threads)
        import vllm  # takes seconds, and reads the environment

        from torchspec_hpc.inference.engines import vllm_compat

        # it warns, with a traceback, that there is no tokenizer to warm up
        logging.getLogger("vllm.renderers.base").setLevel(logging.ERROR)
        arguments = {**llm_arguments(context), **capture_arguments(context)}
        check_extra_args(inference, {field.name for field in dataclasses.fields(vllm.EngineArgs)})
        try:
            self._llm: Any = vllm.LLM(**arguments, **inference.vllm.extra_args)
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
        _logger.info("vLLM %s is ready: %s", vllm.__version__, arguments)

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


def max_prompts(context: EngineContext) -> int:
    """Prompts that may share a batch.

    vLLM's batch-invariant kernels exist for GPUs only; on a CPU a row is the same in
    every batch only if there is nothing else in its batch.
    """
    inference = context.config.inference
    alone = inference.batch_invariant and context.device == "cpu"
    return 1 if alone else inference.inference_batch_size


def environment(context: EngineContext) -> dict[str, str]:
    """Environment variables to set before vLLM is imported: what its arguments cannot say."""
    inference = context.config.inference
    # fork would copy this process's threads half
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    # without handlers of its own, vLLM's warnings end up in this rank's log
    variables["VLLM_CONFIGURE_LOGGING"] = os.environ.get("VLLM_CONFIGURE_LOGGING", "0")
    if context.device == "cpu":
        # in this process: each process of the default spends 12 s on its imports
        if inference.vllm.tp_size == 1:
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # the default pins engines to cores, all on this node to the same ones
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    elif inference.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if inference.num_threads is not None:
        variables["OMP_NUM_THREADS"] = str(inference.num_threads)
    if _max_model_len(context) > context.spec.max_position_embeddings >= context.max_prompt_tokens:
        # the tokens beyond the prompt are never computed, so no position is out of range
        variables["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    return variables


def llm_arguments(context: EngineContext) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` for plain prefill, without capture."""
    config, vllm = context.config, context.config.inference.vllm
    on_cpu = context.device == "cpu"
    arguments: dict[str, Any] = {
        "model": config.model.target_model_path,
        "trust_remote_code": config.model.trust_remote_code,
        "dtype": context.dtype,
        "max_model_len": _max_model_len(context),
        "max_num_seqs": max_prompts(context),
        "max_num_batched_tokens": vllm.max_num_batched_tokens,
        "tensor_parallel_size": vllm.tp_size,
        "gpu_memory_utilization": vllm.mem_fraction_static,
        "kv_cache_memory_bytes": vllm.kv_cache_bytes,
        "enforce_eager": vllm.enforce_eager if vllm.enforce_eager is not None else on_cpu,
        "skip_tokenizer_init": True,
    }
    if on_cpu and vllm.kv_cache_bytes is None:
        arguments["kv_cache_memory_bytes"] = _CPU_KV_CACHE_BYTES
    if config.inference.batch_invariant:
        # how much of a prompt is cached decides how the rest is cut into steps
        arguments["enable_prefix_caching"] = False
    return {name: value for name, value in arguments.items() if value is not None}


def capture_arguments(context: EngineContext) -> dict[str, Any]:
    """Further arguments of ``vllm.LLM`` that make it capture and store hidden states."""
    # vLLM sorts the layers and drops duplicates: an aux layer may be the last one
    captured = sorted(set(context.layers))
    draft = {"hf_config": {"eagle_aux_hidden_state_layer_ids": captured}}
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": draft,
        },
        "kv_transfer_config": {
            "kv_connector": "CaptureConnector",
            "kv_connector_module_path": _CONNECTOR_MODULE,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {
                "run_dir": str(context.run.root),
                "columns": [captured.index(layer) for layer in context.layers],
            },
        },
        "worker_extension_cls": f"{_CONNECTOR_MODULE}.CaptureWorkerExtension",
    }


def _max_model_len(context: EngineContext) -> int:
    return context.max_prompt_tokens + _TOKENS_BEYOND_PROMPT


def check_extra_args(inference: InferenceConfig, known: Collection[str]) -> None:
    """Refuses ``inference.vllm.extra_args`` that are ours to set, or that vLLM does not know.

    Args:
        inference: The engines' settings.
        known: Names that this vLLM knows.

    Raises:
        ConfigError: Names the argument, and the key that sets it or the nearest name.
    """
    for name in inference.vllm.extra_args:
        if name in _MANAGED:
            key = _MANAGED[name]
            raise ConfigError(
                f"inference.vllm.extra_args holds {name}, which is set for you",
                hint=f"set {key} instead" if key else "remove it",
            )
        if name == "enable_prefix_caching" and inference.batch_invariant:
            raise ConfigError(
                f"inference.vllm.extra_args holds {name}, which batch_invariant switches off",
                hint="remove it, or set inference.batch_invariant=false",
            )
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"inference.vllm.extra_args holds {name}, which this vLLM does not know"
                + (f"; did you mean {near[0]}?" if near else "")
            )


def _result(item: dict[str, Any]) -> Result:
    if "reason" in item:
        return Failed(**item)
    return Captured(item["key"], tuple(item["shape"]), item["dtype"])
