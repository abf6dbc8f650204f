"""One run, one directory: the only place that knows its layout."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path
from typing import Any

from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import UserError

#: Target ids of the draft vocabulary: in the run and in each of its checkpoints.
KEPT_IDS = "kept_ids.npy"


class RunDir:
    """Paths of a run on the shared file system.

    ``TORCHSPEC_LOG_DIR`` (absolute, shared) moves the log tree elsewhere.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        # without "..", so that run_id is the same; links stay, which users know the path by
        self.root = Path(os.path.abspath(root))  # noqa: PTH100

        self.config = self.root / "config.yaml"
        self.provenance = self.root / "provenance.json"
        self.run_json = self.root / "run.json"
        self.metrics = self.root / "metrics.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.wandb = self.root / "wandb"
        self.wandb_steps = self.wandb / "steps"  # those that were sent, a line each
        self.checkpoints = self.root / "checkpoints"
        self.latest_checkpoint = self.checkpoints / "latest"  # holds the name of a folder
        self.best_checkpoint = self.checkpoints / "best"  # likewise, and how good it is
        self.kept_ids = self.root / KEPT_IDS
        self.export = self.root / "export"
        self.evaluation = self.root / "evaluation.json"
        self.job = self.root / "job"
        self.code = self.root / "code"  # this package as it was when the job was submitted
        # control: small files, written whole and renamed into place
        self.control = self.root / "control"
        self.secret = self.control / "secret"
        self.endpoints = self.control / "endpoints.json"
        self.lock = self.control / "lock"  # who writes to this directory
        self.stop = self.control / "stop"
        self.cancelled = self.control / "cancelled"  # a person does not want it to go on
        self.done = self.control / "done"
        self.errors = self.control / "errors"
        self.exit_codes = self.control / "exit_codes.json"
        self.attempts = self.control / "attempts.json"
        self.ready = self.control / "ready"  # a file of each engine that is
        self.joined = self.control / "joined"  # a file of each job whose engines joined the run

    def attempt_dir(self, attempt: int) -> Path:
        """Rendered script and header of one attempt."""
        return self.job / f"attempt_{attempt}"

    def script(self, attempt: int) -> Path:
        """The batch script of the job whose first attempt this is."""
        return self.attempt_dir(attempt) / "job.sbatch"

    def newest_script(self) -> Path:
        """The batch script of the newest job."""
        folders = self.job.glob("attempt_*")
        return self.script(max(int(folder.name.removeprefix("attempt_")) for folder in folders))

    def batch_log(self, job_id: str = "%j") -> Path:
        """What the batch script prints, in all attempts of one job."""
        return self.job / f"slurm-{job_id}.out"

    @property
    def run_id(self) -> str:
        """``<run_name>-<8 hex digits>``: of this path, so the same in every attempt."""
        return f"{self.root.name}-{zlib.crc32(str(self.root).encode()):08x}"

    @property
    def logs(self) -> Path:
        """Root of the log tree of this run."""
        moved = os.environ.get("TORCHSPEC_LOG_DIR")
        if not moved:
            return self.root / "logs"
        if not Path(moved).is_absolute():
            raise UserError(
                f"TORCHSPEC_LOG_DIR is {moved!r}", allowed="an absolute path on a shared disk"
            )
        return Path(moved) / self.root.name

    @property
    def latest_logs(self) -> Path:
        """Link to the logs of the newest attempt."""
        return self.logs / "latest"

    def attempt_logs(self, attempt: int) -> Path:
        """Logs of one attempt."""
        return self.logs / f"attempt_{attempt}"

    def rank_log(self, attempt: int, role: str, node: str, rank: int) -> Path:
        """A new log file of one rank.

        Args:
            attempt: Counts from 0.
            role: ``training`` or ``inference``.
            node: Host name as Slurm knows it.
            rank: Global rank in the group.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = self.attempt_logs(attempt) / role / node
        return folder / f"{role}_rank{rank}_{stamp}.log"

    def create(self) -> None:
        """Makes the directories that must exist before anything is submitted.

        Raises:
            UserError: The directory cannot be written.
        """
        try:
            for folder in (self.job, self.control, self.errors, self.ready, self.joined, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write the run directory {self.root}: {error.strerror}",
                hint="choose another output_dir, on a disk that every node can write",
            ) from error


def cache_dir(config: Config) -> Path:
    """Where tokenized data is kept, shared by all runs of an output directory."""
    return Path(config.cache_dir or Path(config.output_dir) / "cache")


def write_atomic(path: Path, content: str | dict[str, Any], mode: int = 0o644) -> None:
    """Writes a file whole or not at all: temporary name, fsync, rename."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
