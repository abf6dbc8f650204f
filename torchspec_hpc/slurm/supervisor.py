"""Runs one attempt of a run: ``python -m torchspec_hpc.slurm.supervisor --run-dir RUN``.

The batch script of a Slurm job turns into this process; ``torchspec-hpc run`` calls the same
:class:`Supervisor` over local processes.  It starts the services, publishes where they answer,
starts the engines and the trainers, and watches them until the trainers have ended.  Then it
stops everything and says how it went: done, requeued, or the one message that tells why not.

How signals end in a checkpoint
    SIGUSR1 (Slurm's warning before the time limit), SIGTERM and the first Ctrl-C write
    ``control/stop``; the trainers see it at the end of their step, write a checkpoint and exit
    with 85.  SIGTERM is what Slurm sends to every process of a job ``KillWait`` seconds before
    SIGKILL; all but this one are shielded from it (shepherd.py).

    SIGTERM does not say what follows, so Slurm is asked (job.py).  Where Slurm has requeued the
    job by itself (``scontrol requeue``, preemption, node failure) the checkpoint is all there
    is to do.  At the time limit we requeue at once, as nobody knows whether we live to see the
    trainers' end.  A cancelled job stays cancelled; its checkpoint serves ``--resume``.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torchspec_hpc.config.endpoints import Endpoints, create_secret
from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import (
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_REQUEUE,
    TorchspecError,
    UserError,
    exit_code_of,
)
from torchspec_hpc.observe.logs import setup_logging
from torchspec_hpc.slurm.attempts import Attempt, History
from torchspec_hpc.slurm.failures import clear_failures
from torchspec_hpc.slurm.job import JobFate
from torchspec_hpc.slurm.lock import RunLocked, run_lock
from torchspec_hpc.slurm.requeue import Ending, Rules, Verdict, decide, record_ending
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.slurm.signals import SignalInbox
from torchspec_hpc.slurm.srun import SlurmLauncher
from torchspec_hpc.slurm.steps import INFERENCE, TRAINING, Launcher, Step
from torchspec_hpc.slurm.watch import Watch, stop_grace_s, write_stop

logger = logging.getLogger(__name__)

ROLE = "supervisor"
#: From the request to leave until engines are killed; they hold nothing that would be lost.
_ENGINE_GRACE_S = 10.0


class Interrupted(TorchspecError):
    """Ctrl-C, for the second time."""


class Supervisor:
    """One attempt of a run.

    Args:
        run: The run, prepared.
        config: Its settings.
        launcher: Where it runs.
    """

    def __init__(self, run: RunDir, config: Config, launcher: Launcher) -> None:
        self._run, self._config, self._launcher = run, config, launcher
        self._rules = Rules(launcher.can_requeue, config.slurm.max_requeues)
        self._inbox = SignalInbox()
        self._steps: dict[str, Step] = {}
        self._codes: dict[str, int | None] = {}
        self._stop_asked_at: float | None = None
        self._engine_grace_s = _ENGINE_GRACE_S
        self._requeued = False

    def run(self) -> int:
        """Runs the attempt and returns the exit code of this process.

        Raises:
            RunLocked: Another attempt writes to this directory.
            UserError: The run was cancelled, or its directory cannot be written or holds a
                broken history.
        """
        self._run.create()
        with self._inbox, run_lock(self._run, self._launcher.job_id):
            if self._run.done.exists():
                logger.info("the run %s is complete", self._run.root)
                return EXIT_DONE
            if self._run.cancelled.exists():  # while this job was about to start
                raise UserError(
                    f"the run {self._run.root} was cancelled",
                    hint=f"to go on with it: torchspec-hpc resume {self._run.root}",
                )
            self._history = History(self._run)
            attempt = self._history.begin(self._launcher.job_id)
            setup_logging(ROLE, 0, self._run, attempt.number)
            logger.info(
                "attempt %d of %s, from step %d",
                attempt.number,
                self._run.root,
                attempt.first_step,
            )
            self._remove_traces()
            return self._conclude(attempt, self._attempt(attempt))

    def _remove_traces(self) -> None:
        """Removes what an earlier attempt left and this one's workers would believe."""
        run = self._run
        files = [run.endpoints, run.stop, run.exit_codes]
        for path in (*files, *run.ready.glob("*.json"), *run.joined.glob("*.json")):
            path.unlink(missing_ok=True)
        clear_failures(run)

    def _attempt(self, attempt: Attempt) -> Ending:
        logs, launcher = self._run.attempt_logs(attempt.number), self._launcher
        services = Services(
            self._config,
            launcher.host,
            logs,
            launcher.modules.control_store,
            launcher.services,
        )
        try:
            ending = self._until_the_end(attempt, services, logs)
        except Interrupted as error:
            self._engine_grace_s = 0
            ending = Ending(128 + signal.SIGINT, str(error))
        except TorchspecError as error:
            # a service or an address that failed before any worker ran: worth another try
            ending = replace(_ending(error), launched=bool(self._steps))
        except Exception as error:  # whatever it is, nothing may stay behind
            logger.exception("the supervisor failed")
            ending = Ending(EXIT_CRASH, f"{type(error).__name__}: {error}")
        self._codes = {name: step.poll() for name, step in self._steps.items()}
        self._stop_all(services)
        return ending

    def _until_the_end(self, attempt: Attempt, services: Services, logs: Path) -> Ending:
        services.start(check=self._act_on_signals)
        if self._stop_asked_at is not None:
            return Ending(EXIT_REQUEUE, "asked to stop before the workers were started")
        self._publish(attempt, services)
        inference = None
        if self._config.inference.num_engines:
            inference = self._steps[INFERENCE] = self._launcher.start_inference(logs)
        training = self._steps[TRAINING] = self._launcher.start_training(logs)
        check = self._act_on_signals
        watch = Watch(self._run, logs, self._config, services, inference, training, check)
        return watch.until_the_end()

    def _publish(self, attempt: Attempt, services: Services) -> None:
        create_secret(self._run)
        assert services.control.endpoint
        assert services.mooncake.endpoint
        Endpoints(
            run_id=self._run.run_id,
            attempt=attempt.number,
            control=services.control.endpoint,
            mooncake_master=services.mooncake.endpoint,
            addresses=self._launcher.addresses,
        ).write(self._run)

    def _act_on_signals(self) -> float | None:
        """Passes requests to stop on to the trainers.

        Returns:
            When (monotonic seconds) they were first asked; None: not yet.

        Raises:
            Interrupted: By a second Ctrl-C.
        """
        for number in self._inbox.take():
            if number is signal.SIGINT and self._stop_asked_at is not None:
                raise Interrupted("interrupted twice: everything was killed")
            self._ask_to_stop(number)
            if number is signal.SIGTERM:
                self._act_on_fate(self._launcher.fate())
        if self._stop_asked_at is None and self._run.stop.exists():
            # a shepherd of the trainers wrote it: steps are signalled without us at preemption
            logger.info("the trainers were asked to stop")
            self._stop_asked_at = time.monotonic()
        return self._stop_asked_at

    def _ask_to_stop(self, number: signal.Signals) -> None:
        if self._stop_asked_at is not None:
            return
        self._stop_asked_at = time.monotonic()
        logger.info(
            "%s: asking the trainers for a checkpoint, for %.0f s at most%s",
            number.name,
            stop_grace_s(self._config),
            "; again to kill everything" if number is signal.SIGINT else "",
        )
        write_stop(self._run, number.name)

    def _act_on_fate(self, fate: JobFate) -> None:
        if fate is not JobFate.RUNNING:
            logger.info("%s", fate.value)
        if fate is JobFate.TIME_LIMIT:
            ending = Ending(EXIT_REQUEUE, "the time limit was reached")
            self._end_history(ending)
            if decide(ending, self._history.attempts, self._rules).requeue:
                self._requeue()

    def _stop_all(self, services: Services) -> None:
        """Ends what still runs; trainers that have not ended by now have nothing to save."""
        if (training := self._steps.get(TRAINING)) is not None:
            training.kill()
        if (inference := self._steps.get(INFERENCE)) is not None:
            inference.interrupt(self._engine_grace_s)
        services.stop()

    def _conclude(self, attempt: Attempt, ending: Ending) -> int:
        """Records how the attempt ended, and requeues where that is due."""
        level = logging.INFO if ending.exit_code in (EXIT_DONE, EXIT_REQUEUE) else logging.ERROR
        logger.log(level, "%s", ending.message)
        self._end_history(ending)
        verdict = self._verdict(ending)
        content = {"attempt": attempt.number, "reason": verdict.reason, "codes": self._codes}
        record_ending(self._run, ending, content)
        if verdict.requeue:
            logger.info("requeue: %s", verdict.reason)
            self._requeue()
        elif verdict.reason:
            logger.info("no requeue: %s", verdict.reason)
        if ending.exit_code != EXIT_DONE and not self._requeued:
            logger.info("to go on: %s", self._launcher.how_to_continue())
        return ending.exit_code

    def _end_history(self, ending: Ending) -> None:
        try:
            self._history.end(ending.exit_code, ending.message)
        except OSError as error:  # a full disk must not hide how it ended
            logger.error("cannot write the history of attempts: %s", error)

    def _verdict(self, ending: Ending) -> Verdict:
        if self._requeued:
            return Verdict(False, "that was done when the time limit was reached")
        verdict = decide(ending, self._history.attempts, self._rules)
        if verdict.requeue and self._run.cancelled.exists():
            return Verdict(False, "the run was cancelled")
        if verdict.requeue:
            fate = self._launcher.fate()
            if fate is JobFate.UNKNOWN:
                logger.error("%s: trying to requeue it all the same", fate.value)
            elif fate not in (JobFate.RUNNING, JobFate.TIME_LIMIT):
                self._requeued = fate is JobFate.REQUEUED
                return Verdict(False, fate.value)
        return verdict

    def _requeue(self) -> None:
        try:
            self._launcher.requeue()
        except TorchspecError as error:
            logger.error("%s", error)
        else:
            self._requeued = True


def _ending(error: TorchspecError) -> Ending:
    return Ending(exit_code_of(error), str(error))


def supervise(run: RunDir, launch: Callable[[Config], Launcher]) -> int:
    """Runs one attempt, and says in one message what kept it from being one."""
    try:
        config = load_config(run.config)
        return Supervisor(run, config, launch(config)).run()
    except TorchspecError as error:
        ending = _ending(error)
        sys.stderr.write(f"error: {ending.message}\n")
        # what is there belongs to the attempt that holds the lock
        if run.control.is_dir() and not isinstance(error, RunLocked):
            record_ending(run, ending, {})
        return ending.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the batch script."""
    parser = argparse.ArgumentParser(description="Supervises one attempt of a run.")
    parser.add_argument("--run-dir", required=True, type=Path, help="the run's directory")
    run = RunDir(parser.parse_args(argv).run_dir)
    return supervise(run, lambda config: SlurmLauncher(run, config, os.environ))


if __name__ == "__main__":
    sys.exit(main())
