"""A run that begins with a published draft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from torchspec_hpc.config import Config, RunDir, parse_config
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta
from torchspec_hpc.drafts.eagle3.config import Eagle3Config
from torchspec_hpc.drafts.eagle3.formats import Served
from torchspec_hpc.drafts.eagle3.model import Eagle3Draft
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.export.checkpoint import DraftCheckpoint
from torchspec_hpc.export.eagle3 import ExportOptions, export_draft
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.draft import build_draft
from torchspec_hpc.training.initial_draft import load_initial_draft
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.vocabulary import load_kept_ids

LAYERS = (1, 2, 3)
KEPT = np.arange(3, 500, 5)


@pytest.fixture
def spec(tiny_target: Path) -> TargetSpec:
    return TargetSpec.from_path(str(tiny_target))


@pytest.fixture
def published(spec: TargetSpec, tmp_path: Path) -> dict[str, Path]:
    """The same draft in both formats."""
    shape = {"intermediate_size": 40, "num_attention_heads": 4, "head_dim": 16}
    config = Eagle3Config.from_target(spec, LAYERS, len(KEPT), shape)
    torch.manual_seed(0)
    draft = Eagle3Draft(config, torch.zeros(512, 64), torch.from_numpy(KEPT))
    weights = {name: parameter.data for name, parameter in draft.named_parameters()}
    meta = CheckpointMeta(7, 28, {"config": config.to_dict()}, "t", stream={}, world_size=1)
    checkpoint = DraftCheckpoint(tmp_path / "step_7", meta, weights, KEPT)
    served = Served("target", "LlamaForCausalLM", 3)
    return {
        name: export_draft(checkpoint, tmp_path / name, ExportOptions(served, name, "float32"))
        for name in ("hf", "speculators")
    }


def config_with(tmp_path: Path, target: Path, **model: object) -> Config:
    raw = {
        "output_dir": str(tmp_path),
        "model": {"target_model_path": str(target), "draft_vocab_size": len(KEPT), **model},
        "dataset": {"train_data_path": "data.jsonl"},
        "training": {"device": "cpu", "compute_dtype": "float32", "ttt_length": 3},
    }
    return parse_config(raw, base_dir=tmp_path, source="test")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", ["hf", "speculators"])
def test_shape_weights_and_vocabulary_are_taken(
    spec: TargetSpec, published: dict[str, Path], tiny_target: Path, tmp_path: Path, name: str
) -> None:
    config = config_with(tmp_path, tiny_target, initial_draft=str(published[name]))
    run, world = RunDir(tmp_path / "run"), World(0, 1, torch.device("cpu"))
    run.root.mkdir()
    initial = load_initial_draft(config.model, spec, LAYERS)
    kept = load_kept_ids(config, run, world, None, spec, None, initial)
    assert kept.tolist() == KEPT.tolist()
    assert np.load(run.kept_ids).tolist() == KEPT.tolist(), "later attempts find them there"
    draft, _, description = build_draft(config, world, spec, LAYERS, kept, initial)
    assert description["config"]["num_attention_heads"] == 4
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter.full_tensor(), initial.weights[name])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"draft_vocab_size": 64}, "its head has 100 tokens, model.draft_vocab_size asks for 64"),
        ({"initial_draft": "/nowhere/draft"}, "model.initial_draft = /nowhere/draft: no such"),
    ],
)
def test_a_configuration_that_does_not_fit(
    spec: TargetSpec, published: dict[str, Path], tiny_target: Path, tmp_path: Path, model, message
) -> None:
    values = {"initial_draft": str(published["hf"]), **model}
    config = config_with(tmp_path, tiny_target, **values)
    with pytest.raises(ConfigError, match=message):
        load_initial_draft(config.model, spec, LAYERS)


def test_a_broken_draft_is_named(
    spec: TargetSpec, published: dict[str, Path], tiny_target: Path, tmp_path: Path
) -> None:
    config = config_with(tmp_path, tiny_target, initial_draft=str(published["hf"]))
    (published["hf"] / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ConfigError, match=r"model.initial_draft = .*cannot read"):
        load_initial_draft(config.model, spec, LAYERS)
    (published["hf"] / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_initial_draft(config.model, spec, LAYERS)


def test_two_beginnings_are_refused(tiny_target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="both give the draft's shape"):
        config_with(tmp_path, tiny_target, initial_draft="/a", draft_model_config="/b.json")
