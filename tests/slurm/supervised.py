"""Runs of stand-in workers under the real supervisor, for its tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers import command_lines, read_jsonl
from tests.slurm.fake_workers.plan import Plan
from torchspec_hpc.config import RunDir, parse_config, save_config
from torchspec_hpc.config.schema import Config
from torchspec_hpc.slurm.snapshot import snapshot_code

#: Settings of a job of stand-in workers on the test cluster.
GROUP = {"cpus_per_task": 1, "mem": "1000M"}
SLURM = {
    "network_interface": "lo",
    "time": "00:10:00",
    "signal_before_s": 60,
    "inference": {**GROUP, "partition": "infer"},
    "training": {**GROUP, "partition": "train"},
}
ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """A run directory, ready to be supervised, and what one finds in it."""

    dir: RunDir
    config: Config

    @property
    def root(self) -> Path:
        return self.dir.root

    @property
    def command(self) -> list[str]:
        module = "tests.slurm.fake_workers.supervise"
        return [sys.executable, "-u", "-m", module, str(self.dir.root)]

    def start(self) -> subprocess.Popen[str]:
        """Starts a local supervisor; its log is on stderr."""
        # Slurm's word for this node would be the cluster fixture's, in some test runs
        env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        return subprocess.Popen(self.command, cwd=ROOT, env=env, text=True, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen[str], timeout_s: float = 30) -> int:
        """Waits for the end; nothing of the run may be left behind."""
        self.log = process.communicate(timeout=timeout_s)[1]
        assert not self.processes(), self.log
        return process.returncode

    def supervise(self, timeout_s: float = 30) -> int:
        """One attempt, from start to end, on this machine."""
        return self.finish(self.start(), timeout_s)

    def processes(self) -> list[str]:
        """Command lines of processes that work for this run."""
        lines = [" ".join(words) for words in command_lines().values()]
        return [line for line in lines if str(self.dir.root) in line]

    def steps(self) -> list[int]:
        """Steps in the order in which they were trained, over all attempts."""
        return [line["step"] for line in read_jsonl(self.dir.metrics)]

    def outcome(self) -> dict[str, Any]:
        return json.loads(self.dir.exit_codes.read_text())

    def supervisor_logs(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.dir.logs.glob("attempt_*/super*.log")))

    def wait(self, what: Callable[[], bool], timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, self.supervisor_logs()
            time.sleep(0.02)

    def wait_step(self, step: int) -> None:
        self.wait(lambda: self.dir.metrics.is_file() and step in self.steps())


def make_run(folder: Path, plan: Plan, **sections: Any) -> Run:
    """A run with small deadlines; `sections` replace settings."""
    settings: dict[str, Any] = {
        "run_name": folder.name,
        "output_dir": str(folder.parent),
        "model": {"target_model_path": "/no/model"},
        "dataset": {"train_data_path": "/no/data"},
        "training": {},
        "inference": {},
        "control": {"service_ready_s": 20, "engine_ready_s": 20, "stop_grace_s": 10},
        "mooncake": {},
        "slurm": {},
    }
    for name, values in sections.items():
        settings[name] = {**settings[name], **values} if isinstance(values, dict) else values
    run = RunDir(folder)
    run.create()
    config = parse_config(settings, base_dir=folder, source="test")
    if config.cluster == "slurm":
        snapshot_code(run)
    save_config(config, run.config)
    plan.write(run)
    return Run(run, config)
