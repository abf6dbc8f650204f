"""Runs of real trainers: torchrun, gloo, FSDP2, Mooncake and the control store."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.helpers import conversations, read_jsonl, write_jsonl
from tests.services import SECRET, control_server, local_endpoints, mooncake_master
from tests.training.producer import Producer, producer
from torchspec_hpc.config import RunDir, parse_config, save_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.config.transfer_schema import MooncakeConfig

MOONCAKE = {"global_segment_size": "32MiB", "local_buffer_size": "16MiB"}


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def endpoints() -> Iterator[Endpoints]:
    with mooncake_master() as master, control_server() as control:
        yield local_endpoints(control.endpoint, master.endpoint)


@pytest.fixture(scope="module")
def engine(endpoints: Endpoints) -> Iterator[Producer]:
    with producer(MooncakeConfig.model_validate(MOONCAKE), endpoints) as made:
        yield made


@dataclasses.dataclass
class Run:
    """A run directory and its attempts."""

    dir: RunDir
    endpoints: Endpoints
    attempt: int = 0

    def train(self, num_ranks: int = 1, timeout_s: float = 120) -> int:
        """One attempt; returns the exit code of the launcher."""
        endpoints = dataclasses.replace(
            self.endpoints, run_id=self.dir.root.name, attempt=self.attempt
        )
        endpoints.write(self.dir)
        self.attempt += 1
        command = [
            sys.executable, "-m", "torchspec_hpc.training.launch", "--standalone",
            "--nproc-per-node", str(num_ranks), "--max-restarts", "0",
            "-m", "torchspec_hpc.training.worker", "--run-dir", str(self.dir.root),
        ]  # fmt: skip
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environ, timeout=timeout_s).returncode

    def records(self) -> list[dict[str, Any]]:
        return read_jsonl(self.dir.metrics)

    def learning(self) -> list[dict[str, Any]]:
        """What must not depend on time: everything but speeds and transfers."""
        return [
            {
                tag: value
                for tag, value in record.items()
                if not tag.startswith(("throughput", "time", "memory", "transfer"))
            }
            for record in self.records()
        ]

    def errors(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.dir.errors.glob("*.json")}


MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(
    tmp_path: Path,
    tiny_target: Path,
    tiny_conversations: Path,
    endpoints: Endpoints,
    engine: Producer,
) -> Iterator[MakeRun]:
    """Makes runs of 8 steps; keyword arguments are settings of `training`."""
    held_out = write_jsonl(tmp_path / "held_out.jsonl", conversations(5))

    def make(
        name: str,
        data: Path = tiny_conversations,
        evaluate: bool = False,
        shuffle: bool = True,
        inference: dict[str, object] | None = None,
        control: dict[str, float] | None = None,
        **training: object,
    ) -> Run:
        run = RunDir(tmp_path / name)
        run.create()
        write_atomic(run.secret, SECRET.hex() + "\n", mode=0o600)
        raw = {
            "output_dir": str(tmp_path),
            "model": {"target_model_path": str(tiny_target), "draft_vocab_size": 128},
            "dataset": {
                "train_data_path": str(data),
                "eval_data_path": str(held_out) if evaluate else None,
                "eval_interval": 3 if evaluate else 0,
                "shuffle_dataset": shuffle,
            },
            "training": {
                "device": "cpu",
                "compute_dtype": "float32",
                "num_threads": 1,
                "num_train_steps": 8,
                "max_seq_length": 96,
                "ttt_length": 3,
                "prefetch_depth": 1,
                "learning_rate": 3e-3,
                "weight_decay": 0.01,
                "save_interval": 0,
                **training,
            },
            "inference": {
                "engine": "hf",
                "aux_hidden_states_layers": [1, 2, 3],
                **(inference or {}),
            },
            "mooncake": MOONCAKE,
            "control": {"request_deadline_s": 20, "service_ready_s": 20, **(control or {})},
        }
        save_config(parse_config(raw, base_dir=tmp_path, source="test"), run.config)
        return Run(run, endpoints)

    yield make
    engine.on_request = lambda request: None
