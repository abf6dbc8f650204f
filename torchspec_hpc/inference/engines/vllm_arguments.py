"""What we tell vLLM: the environment, and the arguments of ``vllm.LLM``."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engine_group import Session
from torchspec_hpc.inference.engines.base import EngineContext, check_arguments

_CONNECTOR_MODULE = "torchspec_hpc.inference.engines.vllm_connector"
_CPU_KV_CACHE_BYTES = 1 << 30
#: vLLM refuses a prompt that leaves no room for a generated token.  Without room for a
#: drafted one it skips, for the whole batch and in silence, the "draft" that captures.
_TOKENS_BEYOND_PROMPT = 2

#: Arguments that are ours to set, and the key that sets them, if there is one.
_MANAGED = {
    "model": "model.target_model_path",
    "trust_remote_code": "model.trust_remote_code",
    "dtype": "inference.dtype",
    "max_model_len": "training.max_seq_length",
    "max_num_seqs": "inference.inference_batch_size",
    "max_num_batched_tokens": "inference.max_num_batched_tokens",
    "tensor_parallel_size": "inference.vllm.tp_size",
    "gpu_memory_utilization": "inference.vllm.mem_fraction_static",
    "kv_cache_memory_bytes": "inference.vllm.kv_cache_bytes",
    "enforce_eager": "inference.vllm.enforce_eager",
    "skip_tokenizer_init": None,
    "speculative_config": None,
    "kv_transfer_config": None,
    "spec_method": None,
    "spec_model": None,
    "spec_tokens": None,
    "distributed_executor_backend": None,
    "nnodes": "inference.inference_num_gpus_per_node",
    "node_rank": None,
    "master_addr": None,
    "master_port": None,
}

_MORE_GPUS = (
    "set inference.inference_num_gpus_per_engine and inference.vllm.tp_size for larger engines, "
    "inference.inference_num_gpus for more of them"
)
_ONE_CONNECTOR = "it would take the place of the connector that captures"
#: Arguments that cannot work here: why, and what to do instead.
_REFUSED = {
    "pipeline_parallel_size": (
        "each stage sees its own layers only, and vLLM's capture needs all",
        _MORE_GPUS,
    ),
    "data_parallel_size": ("its engines would not take requests from our queue", _MORE_GPUS),
    "kv_offloading_size": (_ONE_CONNECTOR, "remove it"),
    "kv_offloading_backend": (_ONE_CONNECTOR, "remove it"),
}


def max_prompts(context: EngineContext) -> int:
    """Prompts that may share a batch.

    vLLM's batch-invariant kernels exist for GPUs only; on a CPU a row is the same in
    every batch only if there is nothing else in its batch.
    """
    inference = context.config.inference
    alone = inference.batch_invariant and context.device == "cpu"
    return 1 if alone else inference.inference_batch_size


def check_generation(context: EngineContext) -> None:
    """Refuses sampled answers on a CPU.

    The engine that captures is a speculative one to vLLM, and its rejection sampler for CPUs
    does not draw from the target's distribution (0.32: at temperature 0.01 tokens that are not
    the likeliest come out, and another request of the batch repeats its first one for ever).

    Raises:
        ConfigError: The answers are to be sampled, and the engine runs on a CPU.
    """
    inference = context.config.inference
    temperature = inference.generation.temperature
    if inference.respond == "target" and context.device == "cpu" and temperature > 0:
        raise ConfigError(
            f"inference.generation.temperature is {temperature} and the engine runs on a CPU, "
            "where vLLM samples wrong tokens while it captures",
            allowed="0 on a CPU",
            hint="set inference.generation.temperature=0, or answer beforehand with"
            " torchspec-hpc data regenerate",
        )


def environment(context: EngineContext) -> dict[str, str]:
    """Environment variables to set before vLLM is imported: what its arguments cannot say."""
    inference = context.config.inference
    # fork would copy this process's threads half
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    # without handlers of its own, vLLM's warnings end up in this rank's log
    variables["VLLM_CONFIGURE_LOGGING"] = os.environ.get("VLLM_CONFIGURE_LOGGING", "0")
    if context.device == "cpu":
        # in this process: each process of the default spends 12 s on its imports
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # the default pins engines to cores, all on this node to the same ones
        binding = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        variables["VLLM_CPU_OMP_THREADS_BIND"] = binding
    elif inference.batch_invariant:
        variables["VLLM_BATCH_INVARIANT"] = "1"
    if context.placement.num_nodes > 1:
        variables["VLLM_HOST_IP"] = context.endpoints.own_address()
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
        "max_num_batched_tokens": config.inference.max_num_batched_tokens,
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


def all_arguments(context: EngineContext, session: Session | None) -> dict[str, Any]:
    """Arguments of an engine that captures.

    Args:
        context: What it is built from.
        session: What its processes agreed on; None for an engine on one node.
    """
    arguments = llm_arguments(context) | capture_arguments(context)
    if session is not None:
        arguments |= {
            "distributed_executor_backend": "mp",
            "nnodes": context.placement.num_nodes,
            "node_rank": context.placement.node,
            "master_addr": session.address,
            "master_port": session.port,
        }
    return arguments | context.config.inference.vllm.extra_args


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
                "rank": context.rank,
                "columns": [captured.index(layer) for layer in context.layers],
            },
        },
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
        if name in _REFUSED:
            reason, hint = _REFUSED[name]
            raise ConfigError(f"inference.vllm.extra_args holds {name}: {reason}", hint=hint)
        if name == "enable_prefix_caching" and inference.batch_invariant:
            raise ConfigError(
                f"inference.vllm.extra_args holds {name}, which batch_invariant switches off",
                hint="remove it, or set inference.batch_invariant=false",
            )
    check_arguments("vLLM", inference.vllm.extra_args, _MANAGED, known)
