"""Decoders of many kinds, against Transformers' own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel

from tests.inference.conftest import random_prompts, relative_error
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.inference.engines import hf_target
from torchspec_hpc.inference.engines.hf_target import HookedTarget, find_decoder

LAYERS = (1, 2, 4)
SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT_ATTENTION = {
    "head_dim": None,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "olmo2": {},
    "phi3": {},
    "gemma2": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": None},
    "gpt_oss": EXPERTS,
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "glm4_moe": EXPERTS,
    "minimax": EXPERTS,  # linear attention in every other layer
    "qwen3_next": EXPERTS,
    "deepseek_v3": EXPERTS | LATENT_ATTENTION,
}
WRAPPED = {
    "gemma3": {"num_hidden_layers": 2},
    "qwen2_5_vl": {"depth": 4, "out_hidden_size": 32},  # as many layers as the language model
    "qwen3_vl": {"depth": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    "llama4": {"num_hidden_layers": 4, "vision_output_dim": 16, "projector_input_dim": 16},
}


def save(folder: Path, name: str) -> nn.Module:
    """A random model of this kind, in evaluation mode."""
    if name in WRAPPED:
        more = EXPERTS if name == "llama4" else {}
        rope = {"rope_parameters": MROPE} if name == "qwen2_5_vl" else {}
        vision = VISION | WRAPPED[name]
        config = CONFIG_MAPPING[name](text_config=SHAPE | more | rope, vision_config=vision)
    else:
        values = SHAPE | MODELS[name]
        config = CONFIG_MAPPING[name](**{k: v for k, v in values.items() if v is not None})
    torch.manual_seed(0)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # larger than the default: layers that change something
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", [*MODELS, *WRAPPED])
def test_states_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = save(tmp_path, name)
    target = HookedTarget(str(tmp_path), layers=LAYERS, dtype=torch.float32, device="cpu")
    prompts = random_prompts([13, 40, 5], vocab_size=100)
    found = target.states(prompts)
    decoder, _ = find_decoder(model)
    for ids, states in zip(prompts, found, strict=True):
        token_ids = torch.tensor(ids.astype("int64"))[None]
        with torch.inference_mode():
            hidden = decoder(input_ids=token_ids, output_hidden_states=True).hidden_states
            whole = model(input_ids=token_ids)[0]
        assert states.shape == (len(ids), 3, 32)
        for column, layer in enumerate(LAYERS[:-1]):
            assert relative_error(states[:, column], hidden[layer][0]) < 1e-4
            assert relative_error(states[:, column], hidden[layer + 1][0]) > 1e-2
        # Transformers' last entry, and the whole model's output, come after the final norm
        assert relative_error(decoder.norm(states[:, -1]), hidden[-1][0]) < 1e-4
        if name != "llama4":  # which has no output without its head
            assert relative_error(decoder.norm(states[:, -1]), whole[0]) < 1e-4


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_is_as_configured(tmp_path: Path, implementation: str) -> None:
    save(tmp_path, "llama")
    target = HookedTarget(
        str(tmp_path),
        layers=LAYERS,
        dtype=torch.float32,
        device="cpu",
        attn_implementation=implementation,
    )
    assert target._decoder.config._attn_implementation == implementation


def test_flash_attention_that_is_not_installed(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    with pytest.raises(ConfigError, match=r"needs a package .*\n.*attn_implementation=sdpa"):
        HookedTarget(
            str(tmp_path),
            layers=LAYERS,
            dtype=torch.float32,
            device="cpu",
            attn_implementation="flash_attention_2",
        )


def test_layers_on_several_devices(tmp_path: Path) -> None:
    """As far as it goes without GPUs: accelerate places the model, and hooks still see it."""
    pytest.importorskip("accelerate")
    save(tmp_path, "qwen2_5_vl")
    prompts = random_prompts([13, 5], vocab_size=100)

    def states(device: str) -> list[torch.Tensor]:
        target = HookedTarget(str(tmp_path), layers=LAYERS, dtype=torch.float32, device=device)
        return target.states(prompts)

    for spread, one in zip(states("auto"), states("cpu"), strict=True):
        assert torch.equal(spread.cpu(), one) or torch.cuda.is_available()


def test_accelerate_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_target.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"accelerate, which .*\n.*pip install accelerate"):
        HookedTarget(str(tmp_path), layers=LAYERS, dtype=torch.float32, device="auto")


def test_a_target_that_is_too_large_is_not_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = {"layers.0": 0, "layers.1": 1, "layers.2": "cpu", "layers.3": "disk"}
    hf_target.require_on_gpus(offloaded)  # without GPUs there is nowhere else
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hf_target.require_on_gpus({"layers.0": 0, "layers.1": 1})
    with pytest.raises(ConfigError, match=r"fit on the 2 GPUs .* 2 of its modules.*\n.*per_engine"):
        hf_target.require_on_gpus(offloaded)


def test_no_more_is_held_than_what_is_returned(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    target = HookedTarget(str(tmp_path), layers=LAYERS, dtype=torch.float32, device="cpu")
    first, second = target.states(random_prompts([9, 4], vocab_size=100))
    assert target._captured is None
    assert first.untyped_storage().nbytes() == 2 * 9 * 3 * 32 * 4
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def test_a_decoder_that_cannot_be_told() -> None:
    model = AutoModel.from_config(CONFIG_MAPPING["llama"](**SHAPE))
    model.others = nn.ModuleList(nn.Identity() for _ in range(4))
    with pytest.raises(ConfigError, match=r"cannot tell .*'others': 4.*\n.*one list of 4 layers"):
        find_decoder(model)
