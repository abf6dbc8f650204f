"""The history of a run's attempts, in ``control/attempts.json``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace

from torchspec_hpc.config.checkpoint_files import latest_step
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import EXIT_CRASH


@dataclass(frozen=True)
class Attempt:
    """One attempt.

    Attributes:
        number: Counts from 0 over the whole run, in whatever job it ran.
        job_id: Slurm's id of the job; None without Slurm.
        started: Seconds since the epoch.
        first_step: Step of the checkpoint it started from; 0: from the beginning.
        last_step: Step of the newest checkpoint at its end; None while it runs.
        ended: Seconds since the epoch; None while it runs.
        exit_code: None while it runs.
        reason: How it ended.
    """

    number: int
    job_id: str | None
    started: float
    first_step: int
    last_step: int | None = None
    ended: float | None = None
    exit_code: int | None = None
    reason: str = ""

    @property
    def made_progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return self.last_step is not None and self.last_step > self.first_step


def last_sign(run: RunDir, attempt: Attempt) -> float:
    """When the newest attempt last wrote to its logs or metrics, seconds since the epoch."""
    files = [run.metrics, *run.attempt_logs(attempt.number).rglob("*.log")]
    times = [path.stat().st_mtime for path in files if path.exists()]
    return max([attempt.started, *times])


class History:
    """All attempts of a run, the one that runs now last."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._path = run.attempts
        text = self._path.read_text(encoding="utf-8") if self._path.is_file() else "[]"
        self.attempts = [Attempt(**fields) for fields in json.loads(text)]

    def begin(self, job_id: str | None) -> Attempt:
        """Adds an attempt that starts now."""
        step = latest_step(self._run)
        if self.attempts and self.attempts[-1].ended is None:
            ended = last_sign(self._run, self.attempts[-1])
            self._replace_last(step, EXIT_CRASH, "killed before it could say why", ended)
        number = self.attempts[-1].number + 1 if self.attempts else 0
        attempt = Attempt(number, job_id, time.time(), first_step=step)
        self.attempts.append(attempt)
        self._save()
        return attempt

    def end(self, exit_code: int, reason: str) -> None:
        """Completes the last attempt."""
        self._replace_last(latest_step(self._run), exit_code, reason, time.time())
        self._save()

    def _replace_last(self, step: int, exit_code: int, reason: str, ended: float) -> None:
        self.attempts[-1] = replace(
            self.attempts[-1],
            last_step=step,
            ended=ended,
            exit_code=exit_code,
            reason=reason,
        )

    def _save(self) -> None:
        content = json.dumps([asdict(attempt) for attempt in self.attempts], indent=2)
        write_atomic(self._path, content + "\n")
