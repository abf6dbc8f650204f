"""What we tell vLLM, without starting it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.inference.conftest import tiny_config
from tests.services import local_endpoints
from torchspec_hpc.config import RunDir
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines.base import EngineContext
from torchspec_hpc.inference.engines.vllm_arguments import (
    capture_arguments,
    check_extra_args,
    check_generation,
    environment,
    llm_arguments,
    max_prompts,
)
from torchspec_hpc.inference.placement import Placement
from torchspec_hpc.target.spec import TargetSpec


@pytest.fixture
def context(tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # arguments for GPUs, too

    def build(device: str = "cpu", max_seq_length: int = 200, **inference: Any) -> EngineContext:
        settings = {"engine": "vllm", "device": device, **inference}
        training = {"max_seq_length": max_seq_length}
        config = tiny_config(tmp_path, tiny_target, inference=settings, training=training)
        endpoints = local_endpoints("127.0.0.1:1", "127.0.0.1:2")
        spec = TargetSpec.from_path(str(tiny_target))
        return EngineContext(config, RunDir(tmp_path), endpoints, spec, 0, Placement(0, 0, 1, (0,)))

    return build


def test_on_a_cpu(context: Any, tiny_target: Path) -> None:
    assert llm_arguments(context()) == {
        "model": str(tiny_target),
        "trust_remote_code": False,
        "dtype": "float32",
        "max_model_len": 202,
        "max_num_seqs": 8,
        "tensor_parallel_size": 1,
        "kv_cache_memory_bytes": 1 << 30,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }


def test_on_a_gpu(context: Any) -> None:
    settings = {
        "inference_num_gpus": 2,
        "inference_num_gpus_per_engine": 2,
        "inference_num_gpus_per_node": 2,
        "max_num_batched_tokens": 4096,
        "dtype": "bfloat16",
        "vllm": {"mem_fraction_static": 0.8, "tp_size": 2},
    }
    arguments = llm_arguments(context("cuda", **settings))
    assert arguments["gpu_memory_utilization"] == 0.8
    assert arguments["tensor_parallel_size"] == 2
    assert arguments["max_num_batched_tokens"] == 4096
    assert arguments["dtype"] == "bfloat16"
    assert arguments["enforce_eager"] is False
    assert "kv_cache_memory_bytes" not in arguments


def test_batch_invariance(context: Any) -> None:
    on_cpu, on_gpu = context(batch_invariant=True), context("cuda", batch_invariant=True)
    assert (max_prompts(on_cpu), max_prompts(on_gpu), max_prompts(context())) == (1, 8, 8)
    assert environment(on_gpu)["VLLM_BATCH_INVARIANT"] == "1"
    assert "VLLM_BATCH_INVARIANT" not in environment(on_cpu)
    assert llm_arguments(on_cpu)["enable_prefix_caching"] is False
    assert llm_arguments(on_gpu)["enable_prefix_caching"] is False


@pytest.mark.parametrize(("max_seq_length", "allowed"), [(510, False), (511, True), (512, True)])
def test_prompts_as_long_as_the_target_takes(
    context: Any, max_seq_length: int, allowed: bool
) -> None:
    variables = environment(context(max_seq_length=max_seq_length))
    assert ("VLLM_ALLOW_LONG_MAX_MODEL_LEN" in variables) is allowed


def test_longer_prompts_are_left_to_vllm_to_refuse(context: Any) -> None:
    assert "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in environment(context(max_seq_length=600))


@pytest.mark.parametrize(
    ("aux", "captured", "columns"),
    [([1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3]), ([2, 4], [2, 4], [0, 1, 1])],
)
def test_layers(context: Any, aux: list[int], captured: list[int], columns: list[int]) -> None:
    arguments = capture_arguments(context(aux_hidden_states_layers=aux))
    draft = arguments["speculative_config"]["draft_model_config"]["hf_config"]
    extra = arguments["kv_transfer_config"]["kv_connector_extra_config"]
    assert draft["eagle_aux_hidden_state_layer_ids"] == captured
    assert extra["columns"] == columns


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pipeline_parallel_size", r"each stage sees its own layers only.*\n.*tp_size"),
        ("kv_offloading_size", "would take the place of the connector that captures"),
        ("spec_method", "spec_method, which is set for you"),
        ("dtype", r"extra_args holds dtype, which is set for you\n.*set inference.dtype instead"),
        ("speculative_config", "speculative_config, which is set for you\n.*remove it"),
        ("enable_prefix_caching", "which batch_invariant switches off"),
        ("blok_size", "this vLLM does not know; did you mean block_size"),
    ],
)
def test_extra_args_that_are_refused(context: Any, name: str, message: str) -> None:
    inference = context(batch_invariant=True, vllm={"extra_args": {name: 1}}).config.inference
    with pytest.raises(ConfigError, match=message):
        check_extra_args(inference, {"block_size", "seed", "enable_prefix_caching"})


def test_extra_args_that_pass(context: Any) -> None:
    settings = {"extra_args": {"block_size": 32, "enable_prefix_caching": True}}
    inference = context(vllm=settings).config.inference
    check_extra_args(inference, {"block_size", "enable_prefix_caching"})


def test_no_sampled_answers_on_a_cpu(context: Any) -> None:
    check_generation(context(respond="dataset"))
    check_generation(context(respond="target", generation={"temperature": 0.0}))
    with pytest.raises(ConfigError, match=r"temperature is 0\.5 and the engine runs on a CPU"):
        check_generation(context(respond="target", generation={"temperature": 0.5}))
