"""Configurations of the submission tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torchspec_hpc.config.load import parse_config, save_config
from torchspec_hpc.config.schema import Config

#: One engine node, two trainer nodes of the test cluster.
SMALL: dict[str, Any] = {
    "cluster": "slurm",
    "run_name": "small",
    "model": {"target_model_path": "org/tiny"},  # a hub id: looked for on the nodes only
    "dataset": {"train_data_path": __file__},  # some file that is there
    "training": {"training_num_nodes": 2, "training_num_gpus_per_node": 1},
    "slurm": {
        "time": "00:10:00",
        "signal_before_s": 60,
        "inference": {"partition": "infer", "cpus_per_task": 2, "mem": "200M"},
        "training": {"partition": "train", "cpus_per_task": 3, "mem": "300M"},
    },
}


def small_config(output_dir: Path, **slurm: Any) -> Config:
    """:data:`SMALL` with runs in `output_dir`; `slurm` replaces settings of that section."""
    raw = {**SMALL, "output_dir": str(output_dir), "slurm": {**SMALL["slurm"], **slurm}}
    return parse_config(raw, base_dir=output_dir, source="test")


def small_config_file(folder: Path) -> Path:
    """The same as a file, with runs in `folder`."""
    path = folder / "small.yaml"
    save_config(small_config(folder), path)
    return path
