"""How runs are doing: our own files first, then one question to Slurm about all of them."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchspec_hpc.config.checkpoint_files import BestCheckpoint, latest_step
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.yaml_io import parse_yaml
from torchspec_hpc.errors import EXIT_REQUEUE, UserError
from torchspec_hpc.slurm.attempts import History
from torchspec_hpc.slurm.job_info import JobInfo
from torchspec_hpc.slurm.lock import Holder
from torchspec_hpc.slurm.record import RunRecord, open_jobs, require_run
from torchspec_hpc.slurm.scheduler import job_infos

_TAIL_BYTES = 65536
#: States in which a run needs somebody.
NEEDS_ATTENTION = ("failed", "lost")


@dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
        run: Its directory.
        state: ``done``, ``running``, ``starting`` (no step in this attempt yet), ``queued``,
            ``stopped`` (with a checkpoint), ``cancelled``, ``failed``, or ``lost``: killed before
            it could say why.
        job_id: Its Slurm job; None for a local run.
        attempt: Number of the newest attempt, from 0; None before the first.
        step: Last step that was logged.
        num_steps: Of the whole run, where the configuration says so.
        checkpoint_step: Step of the latest checkpoint.
        loss: Of the last step.
        accept_len: Training estimate of the acceptance length of the last step.
        best_accept_len: Of the best checkpoint, on held-out samples.
        train_tokens_per_s: Of all trainers, without waiting for data.
        inference_tokens_per_s: Of all engines.
        position: Place in the queue of its partition, where that was asked for.
        reason: Why it waits, or how its last attempt ended.
        start: When it started or is expected to, as Slurm writes times.
        time_left: Until the time limit.
    """

    run: str
    state: str
    job_id: str | None
    attempt: int | None
    step: int
    num_steps: int | None
    checkpoint_step: int
    loss: float | None
    accept_len: float | None
    best_accept_len: float | None
    train_tokens_per_s: float | None
    inference_tokens_per_s: float | None
    position: int | None = None
    reason: str = ""
    start: str = ""
    time_left: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def find_runs(paths: Iterable[Path]) -> list[RunDir]:
    """Run directories among these, and in them.

    Raises:
        UserError: One of them is no run and holds none.
    """
    runs = []
    for path in paths:
        if (path / "run.json").is_file():
            runs.append(RunDir(path))
            continue
        inside = sorted(file.parent for file in path.glob("*/run.json"))
        if not inside:
            raise UserError(
                f"{path} is no run directory and holds none",
                hint="give the directory that submit or run has printed, or the one above it",
            )
        runs += map(RunDir, inside)
    return runs


def read_status(runs: Iterable[RunDir], *, whole_queue: bool = False) -> list[RunStatus]:
    """The state of every run, with one ``squeue``, and none where no run needs it.

    Args:
        runs: Run directories.
        whole_queue: Look at everybody's jobs, to tell the place of these in the queue.

    Raises:
        SchedulerError: The controller does not answer.
        NoSlurmClient: There is no Slurm here, and a run needs it.
    """
    records = [(run, _record(run)) for run in runs]
    jobs = [r.job_id for run, r in records if r.job_id and not run.done.exists()]
    infos = job_infos(jobs, whole_queue=whole_queue)
    return [_status(run, record, infos.get(record.job_id or "")) for run, record in records]


def _record(run: RunDir) -> RunRecord:
    """With its job, also where ``run.json`` does not know it."""
    record = require_run(run)
    if record.cluster == "slurm" and record.job_id is None and open_jobs(run):
        return require_run(run)
    return record


def last_record(run: RunDir, tag: str = "train/loss") -> dict[str, Any]:
    """The newest line of ``metrics.jsonl`` that has this tag; empty before the first."""
    if not run.metrics.is_file():
        return {}
    with run.metrics.open("rb") as file:
        file.seek(max(0, run.metrics.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("ascii", "replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):  # the last one may be half written
            record: dict[str, Any] = json.loads(line)
            if tag in record:
                return record
    return {}


def _status(run: RunDir, record: RunRecord, info: JobInfo | None) -> RunStatus:
    history = History(run).attempts
    metrics = last_record(run)
    best = BestCheckpoint.read(run)
    attempt = history[-1] if history else None
    step = metrics.get("step", 0)
    state, reason = _state(run, record, info)
    if state == "running" and attempt is not None and step <= attempt.first_step:
        state = "starting"
    return RunStatus(
        run=str(run.root),
        state=state,
        job_id=record.job_id,
        attempt=attempt.number if attempt else None,
        step=step,
        num_steps=_num_steps(run),
        checkpoint_step=latest_step(run),
        loss=metrics.get("train/loss"),
        accept_len=metrics.get("train/accept_len"),
        best_accept_len=best.accept_len if best else None,
        train_tokens_per_s=metrics.get("throughput/train_tokens_per_s"),
        inference_tokens_per_s=metrics.get("throughput/inference_tokens_per_s"),
        position=info.position if info else None,
        reason=reason,
        start=info.start if info else "",
        time_left=info.time_left if info and not info.ended else "",
    )


def _state(run: RunDir, record: RunRecord, info: JobInfo | None) -> tuple[str, str]:
    """State and reason."""
    if run.done.exists():
        return "done", ""
    if info is not None and not info.ended:
        if info.state == "PENDING":
            return "queued", info.reason
        return "running", "" if info.state == "RUNNING" else info.state
    if record.cluster == "local" and _lives_here(run):
        return "running", ""
    if record.cluster == "slurm" and record.job_id is None:
        return "lost", "it has no job: submit --resume looks for one and submits if there is none"
    return _ended(run, info)


def _ended(run: RunDir, info: JobInfo | None) -> tuple[str, str]:
    slurm = f"job {info.job_id}: {info.state}" if info else "its process has ended"
    if not run.exit_codes.is_file():
        return ("cancelled" if run.cancelled.exists() else "lost"), slurm
    said = json.loads(run.exit_codes.read_text(encoding="utf-8"))
    reason = said.get("reason") or said["message"].splitlines()[0]
    if run.cancelled.exists():
        return "cancelled", reason
    if info and info.failed and info.exit_code != said["exit_code"]:
        return "failed", slurm  # before its supervisor came to say so: that is of an earlier end
    if said["exit_code"] == EXIT_REQUEUE:
        return "stopped", reason
    return "failed", said["message"].splitlines()[0]


def _lives_here(run: RunDir) -> bool:
    holder = Holder.read(run)
    return holder is not None and (holder.host != socket.gethostname() or not holder.is_gone())


def _num_steps(run: RunDir) -> int | None:
    """Read as plain YAML: validating the configurations of many runs would take a while."""
    if not run.config.is_file():
        return None
    config = parse_yaml(run.config.read_text(encoding="utf-8"), str(run.config))
    steps: int | None = config.get("training", {}).get("num_train_steps")
    return steps
