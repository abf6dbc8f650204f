"""Watches the services and both steps of an attempt until the trainers have ended."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

from torchspec_hpc.config.checkpoint_files import latest_step
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_REQUEUE,
    DeadlineExceeded,
    TorchspecError,
)
from torchspec_hpc.slurm.engine_watch import EnginesLost, EngineWatch
from torchspec_hpc.slurm.failures import Failure, of_the_run, read_failures, root_cause
from torchspec_hpc.slurm.requeue import Ending
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.slurm.steps import TRAINING, Step

logger = logging.getLogger(__name__)

_POLL_S = 0.5
#: Between looks at the shared file system that are not urgent.
_LOOK_EVERY_S = 5.0
_TELL_EVERY_S = 60.0
#: After a worker has said why it fails, its step gets so long to end by itself.
_FAILURE_GRACE_S = 30.0
#: From ``control/done`` to the end of the training step; srun may hang after its tasks' end.
_DONE_GRACE_S = 60.0
#: For trainers that have not made a step: they may be loading, deaf, and have nothing to save.
_IDLE_GRACE_S = 15.0
#: Of the time between Slurm's warning and the time limit: to stop everything and to requeue.
_RESERVE_S, _MIN_GRACE_S, _LOCAL_GRACE_S = 60.0, 30.0, 120.0
_TAIL_BYTES = 8192


class Watch:
    """Watches one attempt.

    Args:
        run: The run.
        logs: Of this attempt.
        config: The run's settings.
        services: Running.
        inference: Running; None: the run has no engines, and needs none.
        training: Running.
        stop_asked_at: Acts on signals, and says when (monotonic seconds) the trainers were
            asked to stop; None: not yet.
    """

    def __init__(
        self,
        run: RunDir,
        logs: Path,
        config: Config,
        services: Services,
        inference: Step | None,
        training: Step,
        stop_asked_at: Callable[[], float | None],
    ) -> None:
        self._run, self._logs, self._services = run, logs, services
        self._grace_s = stop_grace_s(config)
        self._inference, self._training = inference, training
        self._stop_asked_at = stop_asked_at
        self._start = self._told = self._looked = time.monotonic()
        self._first_step = self._last_step = last_logged_step(run)
        self._engines = EngineWatch(run, config.control, self._start)
        self._failing_since: float | None = None
        self._done_since: float | None = None
        # what ended while the trainers needed it, and how long they may still take to save
        self._lost: Ending | None = None
        self._save_until = 0.0

    def until_the_end(self) -> Ending:
        """Returns when the trainers have ended, or when there is no point in waiting for it.

        Raises:
            DeadlineExceeded: No engine became ready in time.
        """
        while True:
            stop_asked_at = self._stop_asked_at()
            if (code := self._training.poll()) is not None:
                end = self._trainers_ended(code)
                return end if end.exit_code == EXIT_DONE else self._lost or end
            now = time.monotonic()
            if ending := self._patience_ends(now, stop_asked_at) or self._look(now):
                return ending
            time.sleep(_POLL_S)

    def _patience_ends(self, now: float, stop_asked_at: float | None) -> Ending | None:
        """The end where trainers were asked to stop and had their time; None: go on waiting."""
        if self._lost is not None:
            if now > self._save_until:
                logger.error("the trainers wrote no checkpoint in time")
                return self._lost
        elif stop_asked_at is None:
            if (lost := self._what_ended()) is not None:
                self._save_before(lost, now)
        elif now - stop_asked_at > self._grace_s:
            return self._did_not_stop()
        return None

    def _look(self, now: float) -> Ending | None:
        """Looks, now and then, at what is slow to look at."""
        if now - self._told > _TELL_EVERY_S:
            self._told = now
            self._tell_progress(now)
        if now - self._looked <= _LOOK_EVERY_S:
            return None
        self._looked = now
        if self._hangs_after_done(now):
            return self._done()
        if self._lost is None:
            if self._a_trainer_failed(now):
                what = "a trainer failed and its step did not end"
                return self._failed(EXIT_CRASH, what, self._training)
            if self._inference is not None:
                self._look_at_engines(self._inference, now)
        return None

    def _trainers_ended(self, code: int) -> Ending:
        if code == EXIT_DONE and self._run.done.exists():
            return self._done()
        if code == EXIT_REQUEUE and not self._trainer_failures():
            saved = latest_step(self._run)
            return Ending(EXIT_REQUEUE, f"stopped with a checkpoint of step {saved}")
        if code == EXIT_DONE:
            what = f"the trainers ended without writing {self._run.done}"
            return self._failed(EXIT_CRASH, what, self._training)
        return self._failed(code, f"the training step ended with {code}", self._training)

    def _done(self) -> Ending:
        return Ending(EXIT_DONE, f"done: {latest_step(self._run)} steps")

    def _hangs_after_done(self, now: float) -> bool:
        """Whether the trainers have been done for long and their step has not ended."""
        if self._done_since is None and self._run.done.exists():
            self._done_since = now
        if self._done_since is None or now - self._done_since < _DONE_GRACE_S:
            return False
        logger.warning("training is done, but its step has not ended: it is killed")
        return True

    def _did_not_stop(self) -> Ending:
        """Asked to, so the run goes on: from its last checkpoint."""
        if self._run.done.exists():
            return self._done()
        logger.error("the training step's log ends with:\n%s", self._training.log_tail())
        return Ending(
            EXIT_REQUEUE,
            f"the trainers did not stop within {self._grace_s:.0f} s (control.stop_grace_s) and "
            f"were killed; the last checkpoint is of step {latest_step(self._run)}",
        )

    def _what_ended(self) -> Ending | None:
        """The failure of what the trainers need: the engines or a service."""
        code = None if self._inference is None else self._inference.poll()
        missed = not self._engines.others_joined and not self._run.done.exists()
        if self._inference and code is not None and missed:
            what = f"all engines have ended, the first with {code}, and the trainers need them"
            return self._failed(code or EXIT_CRASH, what, self._inference)
        try:
            self._services.check()
        except TorchspecError as error:
            return Ending(EXIT_CRASH, str(error))
        return None

    def _save_before(self, lost: Ending, now: float) -> None:
        """Asks the trainers for a checkpoint before the attempt ends with this failure."""
        idle = last_logged_step(self._run) == self._first_step
        grace_s = min(self._grace_s, _IDLE_GRACE_S) if idle else self._grace_s
        self._lost, self._save_until = lost, now + grace_s
        logger.error("%s", lost.message)
        logger.info("asking the trainers for a checkpoint, for %.0f s at most", grace_s)
        write_stop(self._run, lost.message.splitlines()[0])

    def _failed(self, code: int, what: str, step: Step) -> Ending:
        """The cause in a worker's own words; without any, the end of its step's log.

        Engines may have failed before, without ending the run: a worker of this step comes first.
        """
        failures = of_the_run(read_failures(self._run))
        cause = root_cause([f for f in failures if f.role == step.name] or failures)
        if cause is not None:
            logger.info("%s", what)
            return Ending(cause.exit_code, str(cause))
        launched = any((self._logs / step.name).glob("*/*.log"))
        return Ending(code, f"{what}; its log ends with:\n{step.log_tail()}", launched)

    def _a_trainer_failed(self, now: float) -> bool:
        """Whether one did, and its step had its time to end by itself."""
        if self._failing_since is None and self._trainer_failures():
            logger.info("a trainer failed; its step has %.0f s to end", _FAILURE_GRACE_S)
            self._failing_since = now
        return self._failing_since is not None and now - self._failing_since > _FAILURE_GRACE_S

    def _trainer_failures(self) -> list[Failure]:
        return [failure for failure in read_failures(self._run) if failure.role == TRAINING]

    def _look_at_engines(self, inference: Step, now: float) -> None:
        """Raises if none becomes ready in time; ends the attempt if there is none any more."""
        step = last_logged_step(self._run)
        trains, self._last_step = step != self._last_step, step
        try:
            self._engines.look(now, trains=trains)
        except DeadlineExceeded as error:
            hint = f"the inference step's log ends with:\n{inference.log_tail()}"
            raise DeadlineExceeded(error.waited_for, error.seconds, hint=hint) from None
        except EnginesLost as error:
            self._save_before(self._failed(EXIT_CRASH, str(error), inference), now)

    def _tell_progress(self, now: float) -> None:
        logger.info(
            "%d min: step %d, checkpoint of step %d",
            round((now - self._start) / 60),
            last_logged_step(self._run),
            latest_step(self._run),
        )


def stop_grace_s(config: Config) -> float:
    """Seconds from the request to stop until trainers are killed: ``control.stop_grace_s``.

    Its default under Slurm is the time that the warning leaves.
    """
    if config.control.stop_grace_s is not None:
        return config.control.stop_grace_s
    if config.cluster == "local":
        return _LOCAL_GRACE_S
    return max(_MIN_GRACE_S, config.slurm.signal_before_s - _RESERVE_S)


def write_stop(run: RunDir, reason: str) -> None:
    """Asks the trainers for a checkpoint; a full disk is logged and kills nobody."""
    try:
        write_atomic(run.stop, {"reason": reason, "time": time.time()})
    except OSError as error:
        logger.error("cannot ask the trainers to stop: %s", error)


def last_logged_step(run: RunDir) -> int:
    """The newest step in ``metrics.jsonl``; 0 before the first."""
    if not run.metrics.is_file():
        return 0
    with run.metrics.open("rb") as file:
        file.seek(max(0, run.metrics.stat().st_size - _TAIL_BYTES))
        # not parsed as JSON: the last line may be half written
        steps = re.findall(rb'^\{"step": (\d+),', file.read(), re.MULTILINE)
    return int(steps[-1]) if steps else 0
