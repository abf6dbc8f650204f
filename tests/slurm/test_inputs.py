"""What is refused before a job waits in the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.slurm.configs import SMALL
from torchspec_hpc.config.load import parse_config
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.inputs import check_inputs


def config_with(folder: Path, section: str, **values: Any) -> Config:
    raw = {**SMALL, "output_dir": str(folder), section: SMALL.get(section, {}) | values}
    return parse_config(raw, base_dir=folder, source="test")


FILES = [
    ("dataset", "train_data_path"),
    ("dataset", "eval_data_path"),
    ("dataset", "chat_template"),
    ("model", "draft_model_config"),
    ("training", "load_path"),
]


@pytest.mark.parametrize(("section", "key"), FILES)
def test_a_file_that_is_not_there(tmp_path: Path, section: str, key: str) -> None:
    config = config_with(tmp_path, section, **{key: "missing"})
    with pytest.raises(UserError, match=rf"{section}\.{key} = {tmp_path}/missing: no such file"):
        check_inputs(config)


@pytest.mark.parametrize(("section", "key"), FILES)
def test_a_file_that_is_there(tmp_path: Path, section: str, key: str) -> None:
    (tmp_path / "there").touch()
    check_inputs(config_with(tmp_path, section, **{key: "there"}))


def test_an_engine_that_cannot_work_yet(tmp_path: Path) -> None:
    config = config_with(tmp_path, "inference", engine="tokenspeed")
    with pytest.raises(UserError, match=r"engine is tokenspeed, which .*\n  allowed: vllm, hf"):
        check_inputs(config)


def test_a_job_without_engines_has_one_component(tmp_path: Path) -> None:
    values = {"inference_num_gpus": 0, "cache_dir": "states"}
    config = config_with(tmp_path, "inference", **values)
    with pytest.raises(UserError, match=r"num_gpus = 0 with slurm.topology = het.*\n.*=single"):
        check_inputs(config)
    slurm = config.slurm.model_copy(update={"topology": "single"})
    check_inputs(config.model_copy(update={"slurm": slurm}))


def test_wandb_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = config_with(tmp_path, "logging", report_to=["tensorboard", "wandb"])
    with pytest.raises(UserError, match=r"wandb is not installed\n  next: .*\[wandb\]"):
        check_inputs(config)
    slurm = config.slurm.model_copy(update={"python": "/envs/other/bin/python"})
    check_inputs(config.model_copy(update={"slurm": slurm}))  # what that one has is not known here
