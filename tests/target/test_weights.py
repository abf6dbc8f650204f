"""Loading the target's three tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from torchspec_hpc.config.schema import ModelConfig
from torchspec_hpc.drafts.target_head import TargetHead
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.target.weights import TargetTensors, load_target_tensors

V, H = 12, 4
SHAPE = {
    "hidden_size": H,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": V,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        EMBEDDING: torch.randn(V, H, generator=generator),
        NORM: torch.randn(H, generator=generator),
        HEAD: torch.randn(V, H, generator=generator),
        "model.layers.0.mlp.up_proj.weight": torch.randn(3, 3, generator=generator),
    }


def load(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, **keys: str
) -> TargetTensors:
    model = ModelConfig(target_model_path=str(folder), **keys)
    spec = TargetSpec.from_dict(str(folder), SHAPE | {"tie_word_embeddings": tied})
    return load_target_tensors(model, spec, dtype)


def write(folder: Path, stored: dict[str, Tensor]) -> Path:
    save_file(stored, folder / "model.safetensors")
    return folder


def test_single_file(tmp_path: Path) -> None:
    stored = tensors()
    found = load(write(tmp_path, stored))
    assert torch.equal(found.embedding, stored[EMBEDDING])
    assert torch.equal(found.norm, stored[NORM])
    assert torch.equal(found.lm_head, stored[HEAD])


def test_shards_of_other_tensors_are_not_opened(tmp_path: Path) -> None:
    stored = tensors()
    weight_map = {}
    for number, (name, tensor) in enumerate(stored.items()):
        weight_map[name] = f"model-{number}.safetensors"
        if name in (EMBEDDING, NORM, HEAD):
            save_file({name: tensor}, tmp_path / weight_map[name])
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load(tmp_path, dtype=torch.bfloat16)
    assert found.lm_head.dtype == found.embedding.dtype == torch.bfloat16
    assert found.norm.dtype == torch.float32  # norms are computed in float32
    assert torch.equal(found.lm_head, stored[HEAD].bfloat16())

    (tmp_path / weight_map[NORM]).unlink()
    with pytest.raises(ConfigError, match=r"(?s)no model-1\.safetensors.*download is incomplete"):
        load(tmp_path)


def test_what_transformers_writes(tiny_target: Path) -> None:
    spec = TargetSpec.from_path(str(tiny_target))
    found = load_target_tensors(
        ModelConfig(target_model_path=str(tiny_target)), spec, torch.float32
    )
    assert found.embedding.shape == found.lm_head.shape == (512, 64)
    assert found.norm.shape == (64,)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_final_norm_is_that_of_the_model(tmp_path: Path, model_type: str) -> None:
    stored = tensors()
    spec = TargetSpec.from_dict("target", SHAPE | {"model_type": model_type})
    model = ModelConfig(target_model_path=str(write(tmp_path, stored)))
    found = load_target_tensors(model, spec, torch.float32)
    norm = {"llama": LlamaRMSNorm, "gemma2": Gemma2RMSNorm}[model_type](H, eps=1e-6)
    norm.weight.data = stored[NORM]
    y = torch.randn(5, H)
    head = TargetHead(found.norm, found.lm_head, spec.rms_norm_eps)
    torch.testing.assert_close(head.logits(y), norm(y) @ stored[HEAD].T)


def test_tied_head(tmp_path: Path) -> None:
    stored = tensors()
    del stored[HEAD]
    found = load(write(tmp_path, stored), tied=True)
    assert found.lm_head is found.embedding


def test_tied_head_that_is_stored_too(tmp_path: Path) -> None:
    stored = tensors()
    with pytest.raises(ConfigError, match=r"(?s)ties the head.*lm_head.weight is stored.*vLLM"):
        load(write(tmp_path, stored), tied=True)
    stored[HEAD] = stored[EMBEDDING].clone()
    found = load(write(tmp_path, stored), tied=True)
    assert found.lm_head is found.embedding


def test_missing_head_is_not_replaced_by_the_embedding(tmp_path: Path) -> None:
    stored = tensors()
    stored["language_model.lm_head.weight"] = stored.pop(HEAD)
    folder = write(tmp_path, stored)
    with pytest.raises(ConfigError) as error:
        load(folder)
    message = str(error.value)
    for part in (HEAD, "model.lm_head_key", "language_model.lm_head.weight", "tie_word_embeddings"):
        assert part in message
    assert torch.equal(
        load(folder, lm_head_key="language_model.lm_head.weight").lm_head,
        stored["language_model.lm_head.weight"],
    )


@pytest.mark.parametrize(
    ("key", "setting", "renamed"),
    [
        (NORM, "model.norm_key", "transformer.norm.weight"),
        (EMBEDDING, "model.embedding_key", "backbone.embed_tokens.weight"),
    ],
)
def test_missing_norm_or_embedding(tmp_path: Path, key: str, setting: str, renamed: str) -> None:
    stored = tensors()
    stored[renamed] = stored.pop(key)
    with pytest.raises(ConfigError, match=rf"(?s)no tensor {key} \({setting}\).*{renamed}"):
        load(write(tmp_path, stored), tied=True)


def test_shape_that_contradicts_config_json(tmp_path: Path) -> None:
    stored = tensors() | {HEAD: torch.zeros(V + 1, H)}
    with pytest.raises(ConfigError, match=r"(?s)model\.lm_head_key.*\[13, 4\].*\[12, 4\]"):
        load(write(tmp_path, stored))


def test_quantised_head(tmp_path: Path) -> None:
    stored = tensors() | {HEAD: torch.zeros(V, H, dtype=torch.int8)}
    with pytest.raises(ConfigError, match=r"(?s)int8.*take the original model"):
        load(write(tmp_path, stored))


def test_model_without_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"(?s)neither.*save_pretrained"):
        load(tmp_path)


def test_broken_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="weight_map"):
        load(tmp_path)
