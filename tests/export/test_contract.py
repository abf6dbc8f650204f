"""The export contract refuses what engines would silently serve wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.export.conftest import CONFIG, KEPT
from torchspec_hpc.drafts.eagle3.contract import ContractError, check_contract, eagle3_contract
from torchspec_hpc.drafts.eagle3.formats import Served
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft, vocabulary_map

SERVED = Served("target", "LlamaForCausalLM", 3)
OPTIONS = ExportOptions(SERVED)


def test_parameters_of_the_draft_are_the_contract(checkpoint: DraftCheckpoint) -> None:
    assert set(eagle3_contract(CONFIG)) == {*checkpoint.tensors, "d2t", "t2d"}


def test_round_trip(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    export_draft(checkpoint, tmp_path / "out", replace(OPTIONS, dtype="float32"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(written[name], tensor)
    assert (torch.arange(12) + written["d2t"]).tolist() == KEPT.tolist()
    assert written["t2d"].nonzero().flatten().tolist() == KEPT.tolist()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_config_is_written_for_both_engines(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    config = json.loads(
        (export_draft(checkpoint, tmp_path / "out", OPTIONS) / "config.json").read_text()
    )
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 2, 3]
    assert config["rope_parameters"] == CONFIG.rope_parameters
    assert (config["rope_theta"], config["rope_scaling"]) == (1e4, None)
    assert (config["vocab_size"], config["draft_vocab_size"]) == (512, 12)
    assert config["torch_dtype"] == "bfloat16"


def test_scaled_rope_keeps_every_field(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    fields = checkpoint.meta.draft["config"] | {"rope_parameters": rope}
    scaled = replace(checkpoint, meta=replace(checkpoint.meta, draft={"config": fields}))
    config = json.loads(
        (export_draft(scaled, tmp_path / "out", OPTIONS) / "config.json").read_text()
    )
    assert config["rope_parameters"] == rope
    assert config["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}


def test_full_vocabulary_has_no_map() -> None:
    """vLLM has no parameter for it then, and refuses the draft."""
    full = replace(CONFIG, draft_vocab_size=512)
    assert vocabulary_map(full, None) == {}
    assert not {"d2t", "t2d"} & eagle3_contract(full).keys()
    with pytest.raises(UserError, match="0 kept token ids for a draft vocabulary of 12"):
        vocabulary_map(CONFIG, None)


def _drop(t: dict[str, torch.Tensor]) -> None:
    del t["fc.weight"]


def _extra(t: dict[str, torch.Tensor]) -> None:
    t["embed_tokens.weight"] = torch.zeros(512, 64)


def _shape(t: dict[str, torch.Tensor]) -> None:
    t["lm_head.weight"] = t["lm_head.weight"][:-1]


def _transposed(t: dict[str, torch.Tensor]) -> None:
    t["fc.weight"] = t["fc.weight"].T


def _nan(t: dict[str, torch.Tensor]) -> None:
    t["norm.weight"][3] = float("nan")


def _integer(t: dict[str, torch.Tensor]) -> None:
    t["norm.weight"] = t["norm.weight"].long()


def _absolute_ids(t: dict[str, torch.Tensor]) -> None:
    t["d2t"] = torch.from_numpy(KEPT)  # target ids where offsets belong


def _outside(t: dict[str, torch.Tensor]) -> None:
    t["d2t"] = t["d2t"] + 500


def _unsorted(t: dict[str, torch.Tensor]) -> None:
    t["d2t"][0], t["d2t"][1] = t["d2t"][1] + 1, t["d2t"][0] - 1


def _other_mask(t: dict[str, torch.Tensor]) -> None:
    t["t2d"] = t["t2d"].roll(1)


@pytest.mark.parametrize(
    ("violate", "message"),
    [
        (_drop, "fc.weight is missing"),
        (_extra, "embed_tokens.weight is not part of the contract"),
        (_shape, r"lm_head.weight has shape \(11, 64\), not \(12, 64\)"),
        (_transposed, r"fc.weight has shape \(192, 64\)"),
        (_nan, "norm.weight holds values that are not finite"),
        (_integer, "norm.weight is torch.int64"),
        (_absolute_ids, "d2t"),
        (_outside, "outside the target's vocabulary"),
        (_unsorted, "ascending, unique"),
        (_other_mask, "keep different tokens"),
    ],
)
def test_violations_are_refused(checkpoint: DraftCheckpoint, violate, message: str) -> None:
    tensors = dict(checkpoint.tensors) | vocabulary_map(CONFIG, KEPT)
    check_contract(tensors, CONFIG, "hint")
    violate(tensors)
    with pytest.raises(ContractError, match=message):
        check_contract(tensors, CONFIG, "hint")


def test_nothing_is_written_on_a_violation(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    checkpoint.tensors["fc.weight"][0, 0] = float("inf")
    with pytest.raises(ContractError):
        export_draft(checkpoint, tmp_path / "out", OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_not_replaced(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        export_draft(checkpoint, tmp_path / "out", OPTIONS)


def test_an_export_is_replaced_if_asked_for(checkpoint: DraftCheckpoint, tmp_path: Path) -> None:
    export_draft(checkpoint, tmp_path / "out", OPTIONS)
    forced = replace(OPTIONS, dtype="float32", replace=True)
    export_draft(checkpoint, tmp_path / "out", forced)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"also holds thesis.tex"):
        export_draft(checkpoint, tmp_path / "out", forced)
