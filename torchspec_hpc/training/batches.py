"""This rank's stream of micro-batches: which samples, how many of them, when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torchspec_hpc.config.checkpoint_meta import Progress
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.sampler import Sampler, positions_of
from torchspec_hpc.drafts.batch import PackedBatch
from torchspec_hpc.training.answers import Answers, Samples
from torchspec_hpc.training.parallel import World
from torchspec_hpc.training.prefetch import Documents, Prefetcher


@dataclass(frozen=True)
class StepData:
    """What one rank trains on in one optimizer step.

    Attributes:
        batches: Micro-batches, on the CPU.
        wait_s: How long the step waited for them.
    """

    batches: list[PackedBatch]
    wait_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches."""
        return sum(batch.num_tokens for batch in self.batches)


class MicroBatches:
    """Which samples form a step is a pure function of dataset, seed and cursor.

    A micro-batch is one pack of the sampler. Nothing is asked for before the first step is.

    Args:
        dataset: Token ids and loss masks.
        sampler: The stream of packs.
        answers: Where samples are asked for.
        world: The training group.
        config: Micro-batches of a step, and how far ahead to ask.
        start: Where to go on.
        num_steps: The optimizer step at which the run ends.
        window_tokens: Never ask for more tokens than this at a time, beyond one micro-batch:
            what was asked for must fit into this rank's part of the store.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: Sampler,
        answers: Answers,
        world: World,
        config: TrainingConfig,
        start: Progress,
        num_steps: int,
        window_tokens: int,
    ) -> None:
        self._dataset, self._sampler = dataset, sampler
        self._per_step = config.draft_accumulation_steps
        stream = map(self._read, _positions(world, config, start, num_steps))
        self._ahead = Prefetcher(
            stream, answers, world.device, config.prefetch_depth, window_tokens
        )

    def next_step(self, give_up: Callable[[], bool] | None = None) -> StepData:
        """The micro-batches of the next optimizer step.

        Args:
            give_up: Asked while hidden states are late; True ends the wait, and this stream.

        Raises:
            GaveUp: `give_up` said so.
        """
        start = time.monotonic()
        batches = [self._ahead.next(give_up) for _ in range(self._per_step)]
        return StepData(batches, time.monotonic() - start)

    def close(self) -> None:
        """Asks for nothing more."""
        self._ahead.close()

    def _read(self, position: int) -> Documents:
        return [
            (f"train-{position}.{place}", self._dataset[int(index)])
            for place, index in enumerate(self._sampler.samples_at(position))
        ]


def packs_per_step(world: World, config: TrainingConfig) -> int:
    """Packs that all ranks together take in one optimizer step."""
    return world.size * config.draft_accumulation_steps


def steps_of_run(config: TrainingConfig, sampler: Sampler, per_step: int, done: Progress) -> int:
    """The optimizer step at which the run ends.

    Every sample is seen `num_epochs` times; the last step may run into the next epoch.

    Args:
        config: Steps or epochs asked for.
        sampler: The stream of packs.
        per_step: Packs per optimizer step from now on.
        done: How far the run is; the world size may have been another before.
    """
    if config.num_train_steps is not None:
        return config.num_train_steps
    packs_left = max(0, sampler.end_of(config.num_epochs) - done.cursor)
    return done.step + -(-packs_left // per_step)


def _positions(
    world: World, config: TrainingConfig, start: Progress, num_steps: int
) -> Iterator[int]:
    """Stream positions of this rank's micro-batches, step after step."""
    per_step = packs_per_step(world, config)
    for step in range(num_steps - start.step):
        cursor = start.cursor + step * per_step
        yield from positions_of(cursor, world.size, world.rank, config.draft_accumulation_steps)
