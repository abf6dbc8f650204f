"""The draft vocabulary of a run: counted once, and the same ever after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import conversations, write_jsonl
from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.load import parse_config
from torchspec_hpc.data.dataset import TokenDataset, prepare_dataset
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.target.spec import TargetSpec
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.vocabulary import load_kept_ids

WORLD = World(0, 1, torch.device("cpu"))


@pytest.fixture
def config(tmp_path: Path, tiny_target: Path) -> Config:
    raw = {
        "output_dir": str(tmp_path),
        "model": {"target_model_path": str(tiny_target), "draft_vocab_size": 64},
        "dataset": {"train_data_path": str(write_jsonl(tmp_path / "a.jsonl", conversations(20)))},
    }
    return parse_config(raw, base_dir=tmp_path, source="test")


@pytest.fixture
def prepared(config: Config, tmp_path: Path) -> TokenDataset:
    path = config.dataset.train_data_path
    return prepare_dataset(path, config.dataset, config.model, 512, tmp_path / "cache")


@pytest.mark.usefixtures("one_rank")
def test_counted_once_and_checked_on_resume(
    config: Config, prepared: TokenDataset, tmp_path: Path
) -> None:
    spec = TargetSpec.from_path(config.model.target_model_path)
    run, checkpoint = RunDir(tmp_path / "run"), tmp_path / "step_1"
    run.root.mkdir()
    checkpoint.mkdir()

    def load(source: Path | None) -> list[int]:
        kept = load_kept_ids(config, run, WORLD, prepared, spec, source)
        assert kept is not None
        return kept.tolist()

    first = load(None)
    assert len(first) == 64
    assert first == sorted(set(first))
    assert {1, 2} <= set(first)  # beginning and end of text
    np.save(checkpoint / "kept_ids.npy", np.array(first))
    assert load(checkpoint) == first
    np.save(checkpoint / "kept_ids.npy", np.arange(64) + 1)
    with pytest.raises(ConfigError, match="keeps other tokens than the head of"):
        load(checkpoint)
