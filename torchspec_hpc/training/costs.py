"""What each step costs a rank, without gaps: from one measurement to the next."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from torchspec_hpc.training.batches import StepData
from torchspec_hpc.training.device import memory_bytes
from torchspec_hpc.training.meter import Costs
from torchspec_hpc.transfer.feed import FeedStats


class Feed(Protocol):
    """What counts transfers: :class:`torchspec_hpc.transfer.feed.HiddenStateFeed`."""

    def stats(self) -> FeedStats:
        """Totals so far."""


class StepCosts:
    """Time and transfers of the steps of one rank.

    A step is measured before its numbers are gathered and reported, so that part counts for the
    next one: all the time of a run is in some step, in an evaluation or in a checkpoint.

    Args:
        feed: Of the hidden states, of training and of evaluations.
        device: Of this rank.
    """

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self._feed, self._device = feed, device
        self._stats = feed.stats()
        self._start = time.monotonic()
        self._evaluation_s = self._checkpoint_s = 0.0  # since then

    def start(self) -> None:
        """The first step begins; what came before counts for none."""
        self._start = time.monotonic()
        self._evaluation_s = self._checkpoint_s = 0.0

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """What happens in this context takes no time of a step."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._evaluation_s += time.monotonic() - start

    def add_checkpoint(self, seconds: float) -> None:
        """Training stood still for so long."""
        self._checkpoint_s += seconds

    def measure(self, data: StepData) -> Costs:
        """What the step on this data has cost, since the measurement before."""
        before, self._stats = self._stats, self._feed.stats()
        start, self._start = self._start, time.monotonic()
        checkpoint_s, elsewhere_s = self._checkpoint_s, self._checkpoint_s + self._evaluation_s
        self._evaluation_s = self._checkpoint_s = 0.0
        return Costs(
            num_tokens=data.num_tokens,
            num_bytes=self._stats.num_bytes - before.num_bytes,
            num_retries=self._stats.num_retries - before.num_retries,
            wait_s=data.wait_s,
            step_s=self._start - start - elsewhere_s,
            checkpoint_s=checkpoint_s,
            memory_bytes=memory_bytes(self._device),
        )
