from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.training.tiny import training_config
from torchspec_hpc.config.checkpoint_files import Progress
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.training.batches import MicroBatches, samples_per_step, steps_of_run
from torchspec_hpc.training.parallel import World


class Samples:
    """Sample i has 3 + i tokens, all of them i."""

    def __getitem__(self, index: int) -> Sample:
        ids = np.full(3 + index, index, dtype=np.int32)
        return Sample(index, ids, np.ones(len(ids), dtype=bool))


@dataclass
class States:
    """Answers at once, and notes what was asked for and what was taken."""

    asked: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    most_open_tokens: int = 0

    def __post_init__(self) -> None:
        self._open: dict[str, int] = {}

    def submit(self, ticket: str, token_ids: np.ndarray) -> None:
        self.asked.append(ticket)
        self._open[ticket] = len(token_ids)
        self.most_open_tokens = max(self.most_open_tokens, sum(self._open.values()))

    def take(self, ticket: str, give_up: object = None) -> torch.Tensor:
        self.taken.append(ticket)
        return torch.zeros(self._open.pop(ticket), 3, 4)


def stream(
    states: States,
    rank: int = 0,
    size: int = 1,
    start: Progress | None = None,
    num_steps: int = 5,
    window_tokens: int = 10**6,
    **settings: object,
) -> MicroBatches:
    config = training_config(**{"prefetch_depth": 2, "draft_accumulation_steps": 2} | settings)
    return MicroBatches(
        Samples(),
        Sampler(10, seed=3, shuffle=True),
        states,
        World(rank, size, torch.device("cpu")),
        config,
        start or Progress(),
        num_steps,
        window_tokens,
    )


def documents(batch) -> list[int]:
    return [int(ids[0]) for ids in batch.input_ids.split(batch.lengths.tolist())]


def test_ranks_share_the_stream_and_a_resumed_run_goes_on_in_it():
    sampler = Sampler(10, seed=3, shuffle=True)
    seen = {rank: [] for rank in (0, 1)}
    for rank, taken in seen.items():
        batches = stream(States(), rank, size=2, micro_batch_size=2)
        for _ in range(5):
            taken += [documents(batch) for batch in batches.next_step().batches]
    # step by step, micro-batch by micro-batch, rank by rank: the stream without a gap
    flat = [i for pair in zip(seen[0], seen[1], strict=True) for part in pair for i in part]
    assert flat == [sampler.index_at(position) for position in range(40)]
    resumed = stream(States(), 1, size=2, micro_batch_size=2, start=Progress(3, 24))
    assert [documents(batch) for batch in resumed.next_step().batches] == seen[1][6:8]


def test_asks_ahead_across_steps_and_no_further_than_the_end():
    states = States()
    batches = stream(states)
    batches.next_step()
    assert len(states.asked) == 4  # two taken, two ahead: those of the next step
    for _ in range(4):
        batches.next_step()
    assert states.asked == [f"train-{position}" for position in range(10)]
    assert states.taken == states.asked


def test_the_window_bounds_what_is_asked_for():
    states = States()
    batches = stream(
        states, num_steps=10, window_tokens=24, prefetch_depth=8, draft_accumulation_steps=1
    )
    for _ in range(10):
        batches.next_step()
    assert len(states.taken) == 10
    assert 12 < states.most_open_tokens <= 24


def test_a_finished_run_asks_for_nothing():
    states = States()
    stream(states, start=Progress(5, 10))
    assert states.asked == []


@pytest.mark.parametrize(
    ("done", "per_step", "expected"),
    [(Progress(), 4, 5), (Progress(2, 8), 4, 5), (Progress(2, 8), 8, 4), (Progress(9, 20), 4, 9)],
)
def test_steps_cover_every_epoch(done, per_step, expected):
    assert steps_of_run(training_config(num_epochs=2), 10, per_step, done) == expected
    assert steps_of_run(training_config(num_train_steps=7), 10, per_step, done) == 7


def test_samples_per_step():
    world = World(0, 4, torch.device("cpu"))
    config = training_config(micro_batch_size=3, draft_accumulation_steps=2)
    assert samples_per_step(world, config) == 24
