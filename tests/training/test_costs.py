from __future__ import annotations

import pytest
import torch

from torchspec_hpc.training import costs as costs_module
from torchspec_hpc.training.batches import StepData
from torchspec_hpc.training.costs import StepCosts
from torchspec_hpc.transfer.feed import FeedStats


class Feed:
    """Counts what the test says."""

    num_bytes = num_retries = 0

    def stats(self) -> FeedStats:
        return FeedStats(num_bytes=self.num_bytes, num_retries=self.num_retries)


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_all_time_and_all_transfers_are_somewhere(monkeypatch: pytest.MonkeyPatch):
    clock, feed = Clock(), Feed()
    monkeypatch.setattr(costs_module, "time", clock)
    spent = StepCosts(feed, torch.device("cpu"))
    clock.now += 50  # dashboards are opened, say
    feed.num_bytes = 7
    spent.start()
    clock.now += 2
    first = spent.measure(StepData([], wait_s=0.5))
    assert (first.step_s, first.wait_s, first.checkpoint_s) == (2, 0.5, 0)
    assert (first.num_bytes, first.num_retries) == (7, 0)

    clock.now += 1  # its numbers are gathered and reported
    with spent.evaluation():
        clock.now += 10
        feed.num_bytes, feed.num_retries = 107, 3
    clock.now += 5
    spent.add_checkpoint(5)
    clock.now += 2
    second = spent.measure(StepData([], wait_s=0.5))
    assert (second.step_s, second.checkpoint_s) == (3, 5)
    assert (second.num_bytes, second.num_retries) == (100, 3)

    clock.now += 4
    third = spent.measure(StepData([], wait_s=0.5))
    assert (third.step_s, third.checkpoint_s, third.num_bytes, third.num_retries) == (4, 0, 0, 0)
