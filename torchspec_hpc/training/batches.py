"""This rank's stream of micro-batches, asked for ahead of time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchspec_hpc.config.checkpoint_files import Progress
from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler, positions_of
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.training.parallel import World

#: Ticket and sample of each document of a micro-batch.
_MicroBatch = list[tuple[str, Sample]]


class Samples(Protocol):
    """What is trained on: :class:`torchspec_hpc.data.dataset.TokenDataset`."""

    def __getitem__(self, index: int) -> Sample:
        """Token ids and loss mask."""


class HiddenStates(Protocol):
    """Where hidden states come from: :class:`torchspec_hpc.transfer.feed.HiddenStateFeed`."""

    def submit(self, ticket: str, token_ids: NDArray[np.int32]) -> None:
        """Asks for the hidden states of token ids [T]."""

    def take(self, ticket: str, give_up: Callable[[], bool] | None = None) -> Tensor:
        """Waits for hidden states [T, A+1, H], or until `give_up` says to raise ``GaveUp``."""


@dataclass(frozen=True)
class StepData:
    """What one rank trains on in one optimizer step.

    Attributes:
        batches: Micro-batches, on the CPU.
        wait_s: Time spent waiting for hidden states.
    """

    batches: list[PackedBatch]
    wait_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all micro-batches."""
        return sum(batch.num_tokens for batch in self.batches)


class MicroBatches:
    """Which samples form a step is a pure function of dataset, seed and cursor.

    Args:
        dataset: Token ids and loss masks.
        sampler: Order of the stream.
        states: Where hidden states are asked for.
        world: The training group.
        config: Batch sizes and how far ahead to ask.
        start: Where to go on.
        num_steps: The optimizer step at which the run ends.
        window_tokens: Never ask for more tokens than this at a time, beyond one micro-batch:
            what was asked for must fit into this rank's part of the store.
        name: Begins the tickets of this stream.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: Sampler,
        states: HiddenStates,
        world: World,
        config: TrainingConfig,
        start: Progress,
        num_steps: int,
        window_tokens: int,
        name: str = "train",
    ) -> None:
        self._name = name
        self._dataset, self._sampler, self._states = dataset, sampler, states
        self._per_step, self._ahead = config.draft_accumulation_steps, config.prefetch_depth
        self._window_tokens = window_tokens
        self._submitted: deque[_MicroBatch] = deque()
        self._stream = map(self._read, _stream_positions(world, config, start, num_steps))
        self._next = next(self._stream, None)

    def next_step(self, give_up: Callable[[], bool] | None = None) -> StepData:
        """The micro-batches of the next optimizer step.

        Args:
            give_up: Asked while hidden states are late; True ends the wait.

        Raises:
            GaveUp: `give_up` said so.
        """
        batches, wait_s = [], 0.0
        for _ in range(self._per_step):
            self._submit()
            samples = self._submitted.popleft()
            start = time.monotonic()
            states = [self._states.take(ticket, give_up) for ticket, _ in samples]
            wait_s += time.monotonic() - start
            batches.append(
                pack(
                    [
                        (sample.input_ids, sample.loss_mask, state)
                        for (_, sample), state in zip(samples, states, strict=True)
                    ]
                )
            )
        return StepData(batches, wait_s)

    def _submit(self) -> None:
        """Asks for the next micro-batch and those after it, also of the steps to come."""
        while self._next is not None and len(self._submitted) <= self._ahead:
            asked = sum(map(_num_tokens, self._submitted))
            if self._submitted and asked + _num_tokens(self._next) > self._window_tokens:
                return
            for ticket, sample in self._next:
                self._states.submit(ticket, sample.input_ids)
            self._submitted.append(self._next)
            self._next = next(self._stream, None)

    def _read(self, positions: list[int]) -> _MicroBatch:
        return [
            (f"{self._name}-{at}", self._dataset[self._sampler.index_at(at)]) for at in positions
        ]


def samples_per_step(world: World, config: TrainingConfig) -> int:
    """Samples that all ranks together take in one optimizer step."""
    return world.size * config.micro_batch_size * config.draft_accumulation_steps


def steps_of_run(config: TrainingConfig, num_samples: int, per_step: int, done: Progress) -> int:
    """The optimizer step at which the run ends.

    Every sample is seen `num_epochs` times; the last step may run into the next epoch.

    Args:
        config: Steps or epochs asked for.
        num_samples: Of the dataset.
        per_step: Samples per optimizer step from now on.
        done: How far the run is; the world size may have been another before.
    """
    if config.num_train_steps is not None:
        return config.num_train_steps
    samples_left = max(0, config.num_epochs * num_samples - done.cursor)
    return done.step + -(-samples_left // per_step)


def _stream_positions(
    world: World, config: TrainingConfig, start: Progress, num_steps: int
) -> Iterator[list[int]]:
    """Stream positions of this rank's micro-batches, step after step."""
    per_step = samples_per_step(world, config)
    for step in range(num_steps - start.step):
        yield from positions_of(
            start.cursor + step * per_step,
            world.size,
            world.rank,
            config.micro_batch_size,
            config.draft_accumulation_steps,
        )


def _num_tokens(micro_batch: _MicroBatch) -> int:
    return sum(len(sample.input_ids) for _, sample in micro_batch)
