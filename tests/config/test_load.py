"""Configurations: what people write, and what they get wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from torchspec_hpc.config import load_config, save_config
from torchspec_hpc.errors import ConfigError

MINIMAL = """
output_dir: ../runs
model: {target_model_path: ./target}
dataset: {train_data_path: train.jsonl}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "small.yaml"
    path.write_text(MINIMAL)
    return path


def test_relative_paths_start_at_the_file(minimal: Path) -> None:
    config = load_config(minimal)
    assert config.output_dir == str(minimal.parent.parent / "runs")
    assert config.model.target_model_path == str(minimal.parent / "target")
    assert config.dataset.train_data_path == str(minimal.parent / "train.jsonl")
    minimal.write_text(MINIMAL.replace("train.jsonl", "train.jsonl, chat_template: chat.jinja"))
    assert load_config(minimal).dataset.chat_template == str(minimal.parent / "chat.jinja")


def test_relative_paths_of_overrides_start_at_the_working_directory(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(minimal, ["dataset.eval_data_path=data/eval.jsonl"])
    assert config.dataset.eval_data_path == str(tmp_path / "data" / "eval.jsonl")


def test_hub_id_stays_and_directory_is_resolved(minimal: Path) -> None:
    assert load_config(
        minimal, ["model.target_model_path=Qwen/Qwen3-8B"]
    ).model.target_model_path == ("Qwen/Qwen3-8B")


def test_resolved_config_reads_back_unchanged(minimal: Path, tmp_path: Path) -> None:
    config = load_config(minimal, ["training.learning_rate=3e-4", "run_name=x"])
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("training.learning_rate=1e-4", 1e-4),
        ("training.learning_rate=.5", 0.5),
        ("training.seed=010", 10),
        ("training.seed=1_000", 1000),
    ],
)
def test_numbers_mean_what_they_look_like(minimal: Path, text: str, value: float) -> None:
    config = load_config(minimal, [text])
    field = text.split("=")[0].split(".")[1]
    assert getattr(config.training, field) == value


def test_on_is_a_string_not_true(minimal: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.continual_training: .*found 'on'"):
        load_config(minimal, ["training.continual_training=on"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learnin_rate=1", "unknown key; did you mean training.learning_rate"),
        ("slurm.training.memory=1", "did you mean slurm.training.mem"),
        ("training.seed='1'", "valid integer"),
        ("training.seed=1.5", "valid integer"),
        ("training.seed", "has no '='"),
        ("mooncake.local_buffer_size=true", "4GiB"),
        ("run_name=a/b", "pattern"),
        ("inference.inference_num_gpus_per_engine=2", "no multiple of"),
        ("training.seed={", "not valid YAML"),
        ("logging.report_to=swan", "report_to has ['swan']; allowed: ['none', 'ten"),
        ("logging.report_to=[none, wandb]", "['none', 'wandb']: none excludes the others"),
        ("slurm.time=1h", "slurm.time: '1h' is no time of Slurm's; allowed: minutes, MM:SS"),
    ],
)
def test_mistakes_are_named(minimal: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(minimal, [override])


def test_missing_key_and_missing_file(minimal: Path, tmp_path: Path) -> None:
    minimal.write_text("output_dir: x\nmodel: {target_model_path: y}\n")
    with pytest.raises(ConfigError, match="dataset: missing"):
        load_config(minimal)
    with pytest.raises(ConfigError, match="there is no configuration file"):
        load_config(tmp_path / "nothing.yaml")


def test_duplicate_key_is_an_error(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "output_dir: twice\n")
    with pytest.raises(ConfigError, match=r"'output_dir' is given twice \(line 5\)"):
        load_config(minimal)


def test_environment_variables(minimal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minimal.write_text(MINIMAL.replace("../runs", "${env:SCRATCH_FOR_TEST}/runs"))
    with pytest.raises(ConfigError, match="SCRATCH_FOR_TEST is not set"):
        load_config(minimal)
    monkeypatch.setenv("SCRATCH_FOR_TEST", "/scratch/me")
    assert load_config(minimal).output_dir == "/scratch/me/runs"


def test_sizes(minimal: Path) -> None:
    config = load_config(minimal, ["mooncake.global_segment_size=64MiB"])
    assert config.mooncake.global_segment_size == 64 * 1024**2


@pytest.mark.parametrize("text", ["none", "[none]"])
def test_one_name_needs_no_list(minimal: Path, text: str) -> None:
    assert load_config(minimal, [f"logging.report_to={text}"]).logging.report_to == ("none",)
