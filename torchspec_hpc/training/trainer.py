"""The training loop: data, step, metrics, checkpoint, stop."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import replace

import torch

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.checkpoint_meta import Progress
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.errors import EXIT_DONE, EXIT_REQUEUE, DeadlineExceeded, TorchspecError
from torchspec_hpc.training.batches import MicroBatches, packs_per_step
from torchspec_hpc.training.checkpoint import Checkpointer
from torchspec_hpc.training.costs import Feed, StepCosts
from torchspec_hpc.training.device import peak_flops
from torchspec_hpc.training.evaluation import EvaluationSet
from torchspec_hpc.training.meter import EngineMonitor, Meter
from torchspec_hpc.training.optim import Schedule, set_hyperparameters
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.reporter import Reporter
from torchspec_hpc.training.step import Eagle3Step, StepResult, step_weights
from torchspec_hpc.transfer.feed import GaveUp, SampleFailed

logger = logging.getLogger(__name__)


class Trainer:
    """Trains from one checkpoint to the end of the run, or until it is asked to stop.

    Args:
        config: Of the run.
        run: Its directory.
        world: The training group.
        optimizer: Its learning rate is set step by step.
        step: One optimizer step.
        batches: This rank's micro-batches, from `progress` on.
        feed: Where their hidden states come from, for its statistics.
        monitor: Of the engines; read by the main rank.
        checkpointer: Of the run.
        progress: Where to go on.
        num_steps: The optimizer step at which the run ends.
        sampler: The stream of packs, which knows where epochs end.
        evaluation: Held-out samples, if the run has any.
    """

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        *,
        optimizer: torch.optim.AdamW,
        step: Eagle3Step,
        batches: MicroBatches,
        feed: Feed,
        monitor: EngineMonitor,
        checkpointer: Checkpointer,
        progress: Progress,
        num_steps: int,
        sampler: Sampler,
        evaluation: EvaluationSet | None,
    ) -> None:
        self._config, self._run, self._world = config, run, world
        self._optimizer, self._step, self._batches = optimizer, step, batches
        self._costs = StepCosts(feed, world.device)
        self._monitor, self._checkpointer = monitor, checkpointer
        self._progress, self._num_steps, self._sampler = progress, num_steps, sampler
        self._evaluation = evaluation
        self._packs_per_step = packs_per_step(world, config.training)
        self._schedule = Schedule.from_config(config.training, num_steps)
        peak = peak_flops(config.training, world.device)
        self._meter = Meter(world, step_weights(config.training), peak)
        self._reporter: Reporter | None = None  # of the main rank, while it trains
        self._no_data: DeadlineExceeded | SampleFailed | None = None
        self._skips = SkipLimit(config.training.max_skipped_steps)

    def run(self) -> int:
        """Trains.

        Returns:
            The exit code: done, or checkpointed and to be requeued.

        Raises:
            TorchspecError: The gradient was not finite for too many steps in a row.
            DeadlineExceeded: This rank waited for hidden states in vain; all have saved.
            CheckpointError: A checkpoint could not be written.
        """
        with ExitStack() as stack:
            if self._world.is_main:
                first_step = self._progress.step + (self._progress.unreported is None)
                self._reporter = stack.enter_context(
                    Reporter(self._config, self._run, self._monitor, first_step, self._num_steps)
                )
            ended = self._catch_up() and self._train()
            self._checkpointer.wait()
        if self._no_data is not None:
            raise self._no_data
        if not ended:
            logger.info("stopped at step %d, as asked", self._progress.step)
            return EXIT_REQUEUE
        if self._world.is_main:
            write_atomic(self._run.done, {"step": self._num_steps, "time": time.time()})
        logger.info("done after %d steps", self._num_steps)
        return EXIT_DONE

    def _catch_up(self) -> bool:
        """Makes the evaluation that a stop kept the last attempt from.

        Returns:
            False if another stop was asked for before it was made.
        """
        if self._progress.unreported is None:
            return True
        if not self._conclude(self._progress.unreported, evaluate=True):
            return False
        self._checkpointer.amend(self._progress)
        return True

    def _train(self) -> bool:
        """Trains to the end of the run; returns False if it stopped before, as asked."""
        self._costs.start()
        while self._progress.step < self._num_steps:
            self._checkpointer.check()
            before = self._progress
            stop = self._train_one_step()
            progress = self._progress
            ended = progress.step == self._num_steps and progress.unreported is None
            is_best = self._checkpointer.is_best(progress)
            if stop or ended or is_best or self._checkpoint_is_due(before):
                self._costs.add_checkpoint(self._checkpointer.save(progress))
            if stop and not ended:
                return False
        return True

    def _train_one_step(self) -> bool:
        """Trains one optimizer step; returns whether the run was asked to stop."""
        try:
            data = self._batches.next_step(give_up=self._run.stop.exists)
        except GaveUp as gave_up:  # a late engine must not keep us from a checkpoint
            logger.info("%s", gave_up)
            data = None
        except (DeadlineExceeded, SampleFailed) as error:  # keep what there is, then fail
            self._no_data, data = error, None
        learning_rate = self._schedule(self._progress.step - self._progress.skipped)
        set_hyperparameters(self._optimizer, self._config.training, learning_rate)
        stop_asked = self._world.is_main and self._run.stop.exists()
        result = self._step(data.batches if data else None, flag=stop_asked)
        if data is None or result.abandoned:
            return True
        self._progress = Progress(
            step=self._progress.step + 1,
            cursor=self._progress.cursor + self._packs_per_step,
            skipped=self._progress.skipped + (not result.applied),
        )
        values = self._meter.measure(result, self._costs.measure(data))
        values["train/lr"] = learning_rate
        values["train/skipped_steps"] = self._progress.skipped
        values["train/epoch"] = self._sampler.epochs_at(self._progress.cursor)
        is_concluded = self._conclude(values, self._evaluation_is_due())
        self._skips.check(self._progress.step, result)
        return result.flagged or not is_concluded

    def _conclude(self, values: dict[str, float], evaluate: bool) -> bool:
        """Evaluates the draft after a step and reports the step.

        Returns:
            False, on all ranks, if a stop was asked for while held-out samples were awaited. The
            step is reported by the attempt that makes up for its evaluation.
        """
        if self._evaluation is not None and evaluate:
            try:
                with self._costs.evaluation():
                    values = values | self._evaluate(self._evaluation)
            except (GaveUp, DeadlineExceeded, SampleFailed) as error:
                logger.info("step %d is not evaluated yet: %s", self._progress.step, error)
                if not isinstance(error, GaveUp):
                    self._no_data = error
                self._progress = replace(self._progress, unreported=values)
                return False
        accept_len = values.get("eval/accept_len")
        self._progress = replace(self._progress, accept_len=accept_len, unreported=None)
        if self._reporter is not None:
            self._reporter.report(self._progress.step, values)
        return True

    def _evaluate(self, evaluation: EvaluationSet) -> dict[str, float]:
        """Measures the draft on held-out samples; raises ``GaveUp`` on all ranks or on none."""
        batches = evaluation.batches(give_up=self._run.stop.exists)
        return self._meter.evaluate(self._step.evaluate(batches))

    def _evaluation_is_due(self) -> bool:
        step, interval = self._progress.step, self._config.dataset.eval_interval
        return bool(interval) and (step % interval == 0 or step == self._num_steps)

    def _checkpoint_is_due(self, before: Progress) -> bool:
        settings = self._config.training
        by_step = settings.save_interval and self._progress.step % settings.save_interval == 0
        epochs_at = self._sampler.epochs_at
        epoch_ended = int(epochs_at(before.cursor)) != int(epochs_at(self._progress.cursor))
        return bool(by_step or (settings.save_per_epoch and epoch_ended))


class SkipLimit:
    """Ends a run whose gradient is not finite for too many steps in a row.

    Args:
        max_in_a_row: So many steps are too many.
    """

    def __init__(self, max_in_a_row: int) -> None:
        self._max_in_a_row, self._in_a_row = max_in_a_row, 0

    def check(self, step: int, result: StepResult) -> None:
        """Takes note of a step.

        Raises:
            TorchspecError: It is the last straw.
        """
        if result.applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        logger.warning("step %d skipped: its gradient norm is %s", step, result.grad_norm)
        if self._in_a_row >= self._max_in_a_row:
            raise TorchspecError(
                f"the gradient was not finite in {self._in_a_row} steps in a row, "
                f"up to step {step}; training.max_skipped_steps = {self._max_in_a_row}\n"
                "  next:    lower training.learning_rate, or use training.compute_dtype: float32"
            )
