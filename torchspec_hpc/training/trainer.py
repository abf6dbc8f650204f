"""The training loop: data, step, metrics, checkpoint, stop."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import torch

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.config.checkpoint_files import Progress
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.errors import EXIT_DONE, EXIT_REQUEUE, TorchspecError
from torchspec_hpc.training.batches import MicroBatches, StepData, packs_per_step
from torchspec_hpc.training.checkpoint import Checkpointer
from torchspec_hpc.training.device import memory_bytes, peak_flops
from torchspec_hpc.training.evaluation import EvaluationSet
from torchspec_hpc.training.meter import Costs, EngineMonitor, Meter
from torchspec_hpc.training.optim import Schedule, set_hyperparameters
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.reporter import Reporter
from torchspec_hpc.training.step import Eagle3Step, StepResult, step_weights
from torchspec_hpc.transfer.feed import FeedStats, GaveUp, HiddenStateFeed

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
        feed: Where they come from, for its statistics.
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
        feed: HiddenStateFeed,
        monitor: EngineMonitor,
        checkpointer: Checkpointer,
        progress: Progress,
        num_steps: int,
        sampler: Sampler,
        evaluation: EvaluationSet | None,
    ) -> None:
        self._config, self._run, self._world = config, run, world
        self._optimizer, self._step, self._batches = optimizer, step, batches
        self._feed, self._monitor, self._checkpointer = feed, monitor, checkpointer
        self._progress, self._num_steps, self._sampler = progress, num_steps, sampler
        self._evaluation = evaluation
        self._packs_per_step = packs_per_step(world, config.training)
        self._schedule = Schedule.from_config(config.training, num_steps)
        peak = peak_flops(config.training, world.device)
        self._meter = Meter(world, step_weights(config.training), peak)
        self._reporter: Reporter | None = None  # of the main rank, while it trains
        self._skips = SkipLimit(config.training.max_skipped_steps)
        self._checkpoint_s = 0.0  # that training waited for a checkpoint since the last step
        self._accept_len: float | None = None  # of this step's evaluation, if there was one

    def run(self) -> int:
        """Trains.

        Returns:
            The exit code: done, or checkpointed and to be requeued.

        Raises:
            TorchspecError: The gradient was not finite for too many steps in a row.
            CheckpointError: A checkpoint could not be written.
        """
        with ExitStack() as stack:
            if self._world.is_main:
                first_step = self._progress.step + 1
                self._reporter = stack.enter_context(
                    Reporter(self._config, self._run, self._monitor, first_step, self._num_steps)
                )
            while self._progress.step < self._num_steps:
                self._checkpointer.check()
                before = self._progress
                stop = self._train_one_step()
                finished = self._progress.step == self._num_steps
                best_len = self._new_best()
                if stop or finished or best_len or self._checkpoint_is_due(before):
                    self._checkpoint_s = self._checkpointer.save(self._progress, best_len)
                if stop and not finished:
                    self._checkpointer.wait()
                    logger.info("stopped at step %d, as asked", self._progress.step)
                    return EXIT_REQUEUE
            self._checkpointer.wait()
        if self._world.is_main:
            write_atomic(self._run.done, {"step": self._num_steps, "time": time.time()})
        logger.info("done after %d steps", self._num_steps)
        return EXIT_DONE

    def _train_one_step(self) -> bool:
        """Trains one optimizer step; returns whether the run was asked to stop."""
        start, before = time.monotonic(), self._feed.stats()
        self._accept_len = None
        try:
            data = self._batches.next_step(give_up=self._run.stop.exists)
        except GaveUp as gave_up:  # a late engine must not keep us from a checkpoint
            logger.info("%s", gave_up)
            data = None
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
        values = self._meter.measure(result, self._costs(data, before, time.monotonic() - start))
        stop = result.flagged
        if self._evaluation is not None and self._evaluation_is_due():
            try:
                values |= self._evaluate(self._evaluation)
            except GaveUp as gave_up:
                logger.info("step %d is not evaluated: %s", self._progress.step, gave_up)
                stop = True
        if self._reporter is not None:
            values["train/lr"] = learning_rate
            values["train/skipped_steps"] = self._progress.skipped
            values["train/epoch"] = self._sampler.epochs_at(self._progress.cursor)
            self._reporter.report(self._progress.step, values)
        self._skips.check(self._progress.step, result)
        return stop

    def _costs(self, data: StepData, before: FeedStats, step_s: float) -> Costs:
        after = self._feed.stats()
        checkpoint_s, self._checkpoint_s = self._checkpoint_s, 0.0
        return Costs(
            num_tokens=data.num_tokens,
            num_bytes=after.num_bytes - before.num_bytes,
            num_retries=after.num_retries - before.num_retries,
            wait_s=data.wait_s,
            step_s=step_s,
            checkpoint_s=checkpoint_s,
            memory_bytes=memory_bytes(self._world.device),
        )

    def _evaluate(self, evaluation: EvaluationSet) -> dict[str, float]:
        """Measures the draft on held-out samples; raises ``GaveUp`` on all ranks or on none."""
        batches = evaluation.batches(give_up=self._run.stop.exists)
        values = self._meter.evaluate(self._step.evaluate(batches))
        self._accept_len = values["eval/accept_len"]
        return values

    def _new_best(self) -> float | None:
        """Acceptance length of this step's evaluation, if it is the best of the run so far."""
        found = self._accept_len
        return found if found and found > self._checkpointer.best_accept_len else None

    def _evaluation_is_due(self) -> bool:
        step = self._progress.step
        return step % self._config.dataset.eval_interval == 0 or step == self._num_steps

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
