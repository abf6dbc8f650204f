"""Published drafts, ours and others', become what training begins with, or are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspec_hpc.drafts.eagle3.adopt import EMBEDDING, adopted_config, adopted_weights
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.contract import ContractError
from torchspec_hpc.drafts.eagle3.formats import Served, config_json, parameter_name, tensor_name
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec

LAYERS = (1, 2, 3)
SERVED = Served("org/target", "LlamaForCausalLM", 3)


@pytest.fixture
def spec(tiny_target: Path) -> TargetSpec:
    return TargetSpec.from_path(str(tiny_target))


@pytest.fixture
def config(spec: TargetSpec) -> Eagle3Config:
    return replace(Eagle3Config.from_target(spec, LAYERS, 20), intermediate_size=48)


@pytest.mark.parametrize("draft_format", ["hf", "speculators"])
def test_what_is_written_is_read_back(config: Eagle3Config, spec: TargetSpec, draft_format) -> None:
    content = config_json(config, "bfloat16", draft_format, SERVED)
    assert adopted_config(content, spec, LAYERS) == config
    draft = Eagle3Draft(config, torch.zeros(512, 64), torch.arange(20))
    for name, _ in draft.named_parameters():
        assert parameter_name(tensor_name(name, draft_format)) == name


def test_tensors_are_named_as_the_formats_do() -> None:
    name = "midlayer.mlp.up_proj.weight"
    assert tensor_name(name, "hf") == name
    assert tensor_name(name, "speculators") == "layers.0.mlp.up_proj.weight"
    assert tensor_name("fc.weight", "speculators") == "fc.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden_size = 32, the target's is 64"),
        ({"vocab_size": 500}, "vocab_size = 500"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2, not 1"),
        ({"model_type": "qwen3"}, "model_type = 'qwen3'"),
        ({"norm_before_residual": True}, "norm_before_residual = True"),
        ({"fc_norm": True}, "fc_norm = True"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"target_hidden_size": 128}, "target_hidden_size = 128"),
        ({"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}, "reads other layers"),
        ({"intermediate_size": None}, "has no intermediate_size"),
    ],
)
def test_other_drafts_are_refused(
    config: Eagle3Config, spec: TargetSpec, change: dict[str, Any], message: str
) -> None:
    content = config_json(config, "float32", "hf", SERVED) | change
    with pytest.raises(ConfigError, match=message):
        adopted_config(content, spec, LAYERS)


def test_a_silent_speculators_draft_is_one_with_the_norm_before(
    config: Eagle3Config, spec: TargetSpec
) -> None:
    content = config_json(config, "float32", "speculators", SERVED)
    del content["norm_before_residual"]
    with pytest.raises(ConfigError, match="norm_before_residual = True"):
        adopted_config(content, spec, LAYERS)


def test_layers_that_only_sglang_or_only_vllm_would_read_so(
    config: Eagle3Config, spec: TargetSpec
) -> None:
    content = config_json(config, "float32", "hf", SERVED)
    del content["eagle_aux_hidden_state_layer_ids"]  # left: [0, 1, 2], to which SGLang adds one
    assert adopted_config(content, spec, (1, 2, 3)).aux_layers == (1, 2, 3)
    assert adopted_config(content, spec, (0, 1, 2)).aux_layers == (0, 1, 2)
    with pytest.raises(ConfigError, match=r"\[1, 2, 3\] or \[0, 1, 2\] \(as SGLang counts"):
        adopted_config(content, spec, (1, 2, 4))


def _published(config: Eagle3Config, kept: Tensor | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    draft = Eagle3Draft(config, torch.zeros(512, 64), kept)
    tensors = {tensor_name(name, "speculators"): p.data for name, p in draft.named_parameters()}
    if kept is not None:
        tensors["d2t"] = kept - torch.arange(len(kept))
    return tensors


def test_weights_and_vocabulary(config: Eagle3Config) -> None:
    kept = torch.arange(5, 500, 25)[:20]
    embedding = torch.rand(512, 64)
    tensors = _published(config, kept) | {EMBEDDING: embedding.half()}
    weights, found = adopted_weights(tensors, config, lambda: embedding)
    assert torch.equal(found, kept)
    assert torch.equal(
        weights["midlayer.mlp.up_proj.weight"], tensors["layers.0.mlp.up_proj.weight"]
    )
    full = replace(config, draft_vocab_size=512)
    weights, found = adopted_weights(_published(full, None), full, lambda: embedding)
    assert found is None
    assert weights["lm_head.weight"].shape == (512, 64)


def test_tensors_that_do_not_fit_are_refused(config: Eagle3Config) -> None:
    tensors, embedding = _published(config, torch.arange(20)), torch.rand(512, 64)
    with pytest.raises(ConfigError, match="an embedding of its own"):
        adopted_weights(tensors | {EMBEDDING: embedding + 1}, config, lambda: embedding)
    with pytest.raises(ContractError, match=r"fc.bias is not part of the contract"):
        adopted_weights(tensors | {"fc.bias": torch.zeros(64)}, config, lambda: embedding)
    del tensors["d2t"]
    with pytest.raises(ContractError, match="d2t is missing"):
        adopted_weights(tensors, config, lambda: embedding)
