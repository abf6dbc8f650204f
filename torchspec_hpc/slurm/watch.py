"""Watches the services and both steps of an attempt until the trainers have ended."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from torchspec_hpc.config.checkpoint_files import latest_step
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import ControlConfig
from torchspec_hpc.errors import EXIT_CRASH, EXIT_DONE, EXIT_REQUEUE, DeadlineExceeded
from torchspec_hpc.slurm.failures import read_failures, root_cause
from torchspec_hpc.slurm.requeue import Ending
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.slurm.steps import Step

logger = logging.getLogger(__name__)

_POLL_S = 0.5
#: Between looks at the shared file system that are not urgent.
_LOOK_EVERY_S = 5.0
_TELL_EVERY_S = 60.0
#: After a worker has said why it fails, its step gets so long to end by itself.
_FAILURE_GRACE_S = 30.0
_TAIL_BYTES = 8192


class Watch:
    """Watches one attempt.

    Args:
        run: The run.
        logs: Of this attempt.
        config: Deadlines.
        services: Running.
        inference: Running.
        training: Running.
        stop_asked_at: Acts on signals, and says when (monotonic seconds) the trainers were
            asked to stop; None: not yet.
    """

    def __init__(
        self,
        run: RunDir,
        logs: Path,
        config: ControlConfig,
        services: Services,
        inference: Step,
        training: Step,
        stop_asked_at: Callable[[], float | None],
    ) -> None:
        self._run, self._logs, self._config, self._services = run, logs, config, services
        self._inference, self._training = inference, training
        self._stop_asked_at = stop_asked_at
        self._start = self._told = self._looked = time.monotonic()
        self._first_step = last_logged_step(run)
        self._engine_is_ready = False
        self._failing_since: float | None = None

    def until_the_end(self) -> Ending:
        """Returns when the trainers have ended, or when there is no point in waiting for it.

        Raises:
            TorchspecError: A service ended.
            DeadlineExceeded: No engine became ready in time, or the trainers did not stop.
        """
        while True:
            stop_asked_at = self._stop_asked_at()
            if (code := self._training.poll()) is not None:
                return self._trainers_ended(code)
            now = time.monotonic()
            if stop_asked_at is None:
                if (code := self._inference.poll()) is not None:
                    return self._engines_ended(code)
            elif now - stop_asked_at > self._config.stop_grace_s:
                raise DeadlineExceeded(
                    "the trainers to stop (control.stop_grace_s)",
                    self._config.stop_grace_s,
                    hint=f"the training step's log ends with:\n{self._training.log_tail()}",
                )
            self._services.check()
            if now - self._looked > _LOOK_EVERY_S:
                self._looked = now
                if self._a_worker_failed(now):
                    return self._failed(EXIT_CRASH, "a worker failed and its step did not end")
                self._check_engines(now)
            if now - self._told > _TELL_EVERY_S:
                self._told = now
                self._tell_progress(now)
            time.sleep(_POLL_S)

    def _trainers_ended(self, code: int) -> Ending:
        saved = latest_step(self._run)
        if code == EXIT_DONE and self._run.done.exists():
            return Ending(EXIT_DONE, f"done: {saved} steps")
        if code == EXIT_REQUEUE:
            return Ending(EXIT_REQUEUE, f"stopped with a checkpoint of step {saved}")
        if code == EXIT_DONE:
            return self._failed(EXIT_CRASH, f"the trainers ended without writing {self._run.done}")
        return self._failed(code, f"the training step ended with {code}", self._training)

    def _engines_ended(self, code: int) -> Ending:
        what = (
            f"the inference step ended with {code} while the trainers still needed it "
            "(engines are not started again within an attempt)"
        )
        return self._failed(code or EXIT_CRASH, what, self._inference)

    def _failed(self, code: int, what: str, step: Step | None = None) -> Ending:
        """The cause in a worker's own words; without any, the end of its step's log."""
        cause = root_cause(read_failures(self._run))
        if cause is not None:
            logger.info("%s", what)
            return Ending(cause.exit_code, str(cause))
        if step is None:
            return Ending(code, what)
        launched = any((self._logs / step.name).glob("*/*.log"))
        return Ending(code, f"{what}; its log ends with:\n{step.log_tail()}", launched)

    def _a_worker_failed(self, now: float) -> bool:
        """Whether one did, and its step had its time to end by itself."""
        if self._failing_since is None and read_failures(self._run):
            logger.info("a worker failed; its step has %.0f s to end", _FAILURE_GRACE_S)
            self._failing_since = now
        return self._failing_since is not None and now - self._failing_since > _FAILURE_GRACE_S

    def _check_engines(self, now: float) -> None:
        """Raises if none is ready in time; a step of the trainers shows as well that one is."""
        if self._engine_is_ready:
            return
        self._engine_is_ready = (
            any(self._run.ready.glob("inference_*.json"))
            or last_logged_step(self._run) != self._first_step
        )
        if not self._engine_is_ready and now - self._start > self._config.engine_ready_s:
            raise DeadlineExceeded(
                "an engine to become ready (control.engine_ready_s)",
                self._config.engine_ready_s,
                hint=f"the inference step's log ends with:\n{self._inference.log_tail()}",
            )

    def _tell_progress(self, now: float) -> None:
        logger.info(
            "%d min: step %d, checkpoint of step %d",
            round((now - self._start) / 60),
            last_logged_step(self._run),
            latest_step(self._run),
        )


def last_logged_step(run: RunDir) -> int:
    """The newest step in ``metrics.jsonl``; 0 before the first."""
    if not run.metrics.is_file():
        return 0
    with run.metrics.open("rb") as file:
        file.seek(max(0, run.metrics.stat().st_size - _TAIL_BYTES))
        # not parsed as JSON: the last line may be half written
        steps = re.findall(rb'^\{"step": (\d+),', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0
