"""The whole program, from the command line down, with a tiny target."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import command_lines, read_jsonl
from tests.slurm.conftest import cluster  # noqa: F401 - a fixture
from torchspec_hpc.config.yaml_io import dump_yaml

ConfigWriter = Callable[..., Path]


@pytest.fixture
def config_file(tmp_path: Path, tiny_target: Path, tiny_conversations: Path) -> ConfigWriter:
    """Writes the YAML of a tiny run; keyword arguments replace or extend its sections."""

    def write(**sections: Any) -> Path:
        config = tiny_config(tmp_path / "runs", tiny_target, tiny_conversations)
        for name, values in sections.items():
            if isinstance(values, dict):
                config[name] = config.get(name, {}) | values
            else:
                config[name] = values
        path = tmp_path / f"{config['run_name']}.yaml"
        path.write_text(dump_yaml(config))
        return path

    return write


def tiny_config(output: Path, target: Path, conversations: Path) -> dict[str, Any]:
    """One engine of one process, one trainer; Transformers on the CPU, float32."""
    return {
        "run_name": "tiny",
        "output_dir": str(output),
        "model": {"target_model_path": str(target), "draft_vocab_size": 256},
        "dataset": {"train_data_path": str(conversations)},
        "training": {
            "device": "cpu",
            "compute_dtype": "float32",
            "num_threads": 1,
            "num_train_steps": 12,
            "micro_batch_size": 2,
            "draft_accumulation_steps": 2,
            "max_seq_length": 128,
            "ttt_length": 3,
            "learning_rate": 2e-3,
            "save_interval": 0,
        },
        "inference": {
            "engine": "hf",
            "aux_hidden_states_layers": [1, 2, 3],
            "batch_invariant": True,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 1,
        },
        "mooncake": {"global_segment_size": "64MiB", "local_buffer_size": "32MiB"},
        "control": {"heartbeat_s": 1, "engine_ready_s": 120, "request_deadline_s": 60},
        "slurm": {
            "network_interface": "lo",
            "time": "00:10:00",
            "signal_before_s": 60,
            "inference": {"partition": "infer", "cpus_per_task": 1, "mem": "2000M", "gpus": "none"},
            "training": {"partition": "train", "cpus_per_task": 1, "mem": "2000M", "gpus": "none"},
        },
    }


def torchspec_hpc(
    *argv: str | Path, env: dict[str, str] | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    program = Path(sys.executable).with_name("torchspec-hpc")
    return subprocess.run(
        [program, *argv], env=env or dict(os.environ), text=True, capture_output=True,
        timeout=timeout_s,
    )  # fmt: skip


def engines_of(run: Path, rank: int | None = 0) -> list[int]:
    """Processes of an engine of a run, its shepherd left out; None: the run's own, under Slurm."""
    own = [""] if rank is None else ["--rank", str(rank)]
    command = ["-m", "torchspec_hpc.inference.worker", "--run-dir", str(run), *own]
    return [
        process
        for process, words in command_lines().items()
        if words[1 : 1 + len(command)] == command
    ]


def losses(run: Path) -> dict[int, float]:
    """Training loss by step; a step must stand in the file once."""
    records = [r for r in read_jsonl(run / "metrics.jsonl") if "train/loss" in r]
    by_step = {record["step"]: record["train/loss"] for record in records}
    assert len(by_step) == len(records), "a step is logged twice"
    return by_step
