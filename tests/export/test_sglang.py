"""SGLang's own loader, taken out of its source, finds a place for every tensor that we write.

SGLang itself needs a GPU. Its source is found where it is installed, or in the unpacked wheel that
``tools/test.sh`` leaves in ``.cache/sglang-VERSION``.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.export.conftest import CONFIG, KEPT
from torchspec_hpc.drafts.eagle3.formats import Served
from torchspec_hpc.export.card import sglang_command
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft

ROOT = Path(__file__).parents[2]
#: As sglang/srt/models/llama_eagle3.py names its modules; embed_tokens it takes from the target.
LAYER = "model.layers.0."
SHAPES = {
    "model.fc.weight": (64, 3 * 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (12, 64),
    LAYER + "self_attn.qkv_proj.weight": ((4 + 2 + 2) * 8, 2 * 64),
    LAYER + "self_attn.o_proj.weight": (64, 4 * 8),
    LAYER + "mlp.gate_up_proj.weight": (2 * 24, 64),
    LAYER + "mlp.down_proj.weight": (64, 24),
    LAYER + "input_layernorm.weight": (64,),
    LAYER + "hidden_norm.weight": (64,),
    LAYER + "post_attention_layernorm.weight": (64,),
}


@pytest.fixture
def source() -> Path:
    if unpacked := sorted((ROOT / ".cache").glob("sglang-*/sglang")):
        return unpacked[-1]
    found = importlib.util.find_spec("sglang")
    if found is None or found.origin is None:
        pytest.skip("no source of SGLang: run tools/test.sh once, or install it")
    return Path(found.origin).parent


class Model:
    """What ``load_weights`` asks a model for."""

    def __init__(self) -> None:
        self.loaded: dict[str, dict[Any, torch.Tensor]] = {}
        self.hot_token_id: torch.Tensor | None = None

    def named_parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        for name, shape in SHAPES.items():
            parameter = torch.empty(shape)
            parameter.weight_loader = lambda _, tensor, shard=None, name=name: (
                self.loaded.setdefault(name, {}).__setitem__(shard, tensor)
            )
            yield name, parameter


def test_every_tensor_finds_its_place(
    source: Path, checkpoint: DraftCheckpoint, tmp_path: Path
) -> None:
    served = Served("target", "LlamaForCausalLM", 3)
    folder = export_draft(checkpoint, tmp_path / "out", ExportOptions(served, dtype="float32"))
    tensors = load_file(folder / "model.safetensors")
    model = Model()
    _function(source / "srt/models/llama_eagle3.py", "load_weights")(model, tensors.items())

    assert model.hot_token_id.tolist() == KEPT.tolist()
    assert model.loaded.keys() == SHAPES.keys(), "a parameter that gets nothing keeps noise"
    for name, shards in model.loaded.items():
        assert sum(tensor.shape[0] for tensor in shards.values()) == SHAPES[name][0], name
        assert all(tensor.shape[1:] == SHAPES[name][1:] for tensor in shards.values()), name
    qkv = model.loaded[LAYER + "self_attn.qkv_proj.weight"]
    assert torch.equal(qkv["k"], checkpoint.tensors["midlayer.self_attn.k_proj.weight"])


def test_layers_are_counted_as_sglang_counts(
    source: Path, checkpoint: DraftCheckpoint, tmp_path: Path
) -> None:
    served = Served("target", "LlamaForCausalLM", 3)
    folder = export_draft(checkpoint, tmp_path / "out", ExportOptions(served))
    ids = json.loads((folder / "config.json").read_text())["eagle_config"][
        "eagle_aux_hidden_state_layer_ids"
    ]

    class Target:
        pp_group = type("Group", (), {"is_last_rank": True})
        model = type("Model", (), {})

    target = Target()
    _function(source / "srt/models/llama.py", "set_eagle3_layers_to_capture")(target, ids)
    assert target.model.layers_to_capture == list(CONFIG.aux_layers)


def test_the_command_of_the_card_uses_options_that_exist(source: Path) -> None:
    command = sglang_command(Path("draft"), Served("target", "", 3))
    fields = (source / "srt/arg_groups/field_order.py").read_text()
    for option in re.findall(r"--([a-z-]+)", command):
        assert f'"{option.replace("-", "_")}"' in fields, option


def _function(file: Path, name: str) -> Any:
    """A function of a source file, made without importing the file."""
    text = file.read_text(encoding="utf-8")
    [node] = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    scope: dict[str, Any] = {
        "torch": torch,
        "Iterable": Iterable,
        "Tuple": tuple,
        "Optional": __import__("typing").Optional,
        "List": list,
        "default_weight_loader": lambda parameter, tensor: parameter.weight_loader(
            parameter, tensor
        ),
    }
    exec(textwrap.dedent(ast.get_source_segment(text, node, padded=True) or ""), scope)
    return scope[name]
