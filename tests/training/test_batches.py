from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.training.tiny import training_config
from torchspec_hpc.config.checkpoint_meta import Progress
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.training.answers import DatasetAnswers
from torchspec_hpc.training.batches import MicroBatches, packs_per_step, steps_of_run
from torchspec_hpc.training.parallel import World
from torchspec_hpc.transfer.feed import GaveUp, SampleFailed

LENGTHS = np.arange(3, 13)
NEVER_S = 60.0


class Samples:
    """Sample i has 3 + i tokens, all of them i."""

    def __getitem__(self, index: int) -> Sample:
        ids = np.full(LENGTHS[index], index, dtype=np.int32)
        return Sample(index, ids, np.arange(len(ids)) % 2 == 0)


@dataclass
class States:
    """Answers when it may, and notes what was asked for and what was taken.

    Attributes:
        answers: Set while states arrive.
        refused: The ticket that no engine can serve.
        delay_s: Before each answer.
    """

    asked: list[str] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    answers: threading.Event = field(default_factory=threading.Event)
    refused: str = ""
    delay_s: Callable[[], float] = lambda: 0.0

    def __post_init__(self) -> None:
        self.answers.set()
        self._open: dict[str, int] = {}

    def submit(self, ticket: str, token_ids: np.ndarray) -> None:
        self._open[ticket] = len(token_ids)
        self.asked.append(ticket)

    def take(self, ticket: str, give_up: Callable[[], bool]) -> torch.Tensor:
        while not self.answers.wait(0.01):
            if give_up():
                raise GaveUp(ticket)
        if ticket == self.refused:
            raise SampleFailed(f"sample {ticket!r}: too long")
        time.sleep(self.delay_s())
        self.taken.append(ticket)
        num_tokens = self._open.pop(ticket)
        return torch.arange(num_tokens * 12, dtype=torch.float32).view(num_tokens, 3, 4)


@pytest.fixture
def stream():
    """Makes streams of ten samples; they are closed in the end, which must not take long."""
    made = []

    def make(
        states: States,
        rank: int = 0,
        size: int = 1,
        start: Progress | None = None,
        num_steps: int = 5,
        window_tokens: int = 10**6,
        device: str = "cpu",
        **settings: object,
    ) -> MicroBatches:
        config = settings_of(**settings)
        made.append(
            MicroBatches(
                Samples(),
                Sampler(LENGTHS, config, shuffle=True),
                DatasetAnswers(states),
                World(rank, size, torch.device(device)),
                config,
                start or Progress(),
                num_steps,
                window_tokens,
            )
        )
        return made[-1]

    yield make
    start = time.monotonic()
    for batches in made:
        batches.close()
    assert time.monotonic() - start < 2
    names = [thread.name for thread in threading.enumerate()]
    assert not {"ask_ahead", "pack_ahead"} & set(names)


def settings_of(**settings: object):
    packing = {} if "micro_batch_size" in settings else {"micro_batch_tokens": 24}
    defaults = {"seed": 3, "prefetch_depth": 2, "draft_accumulation_steps": 2, **packing}
    return training_config(**defaults | settings)


def documents(batch) -> list[int]:
    return [int(ids[0]) for ids in batch.input_ids.split(batch.lengths.tolist())]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + NEVER_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("packing", [{"micro_batch_size": 2}, {"micro_batch_tokens": 24}])
def test_ranks_share_the_stream_and_a_resumed_run_goes_on_in_it(stream, packing):
    sampler = Sampler(LENGTHS, settings_of(**packing), shuffle=True)
    seen = {rank: [] for rank in (0, 1)}
    for rank, taken in seen.items():
        batches = stream(States(), rank, size=2, **packing)
        for _ in range(5):
            taken += [documents(batch) for batch in batches.next_step().batches]
    # step by step, micro-batch by micro-batch, rank by rank: the stream without a gap
    flat = [pack for pair in zip(seen[0], seen[1], strict=True) for pack in pair]
    assert flat == [list(sampler.samples_at(position)) for position in range(20)]
    resumed = stream(States(), 1, size=2, start=Progress(3, 12), **packing)
    assert [documents(batch) for batch in resumed.next_step().batches] == seen[1][6:8]
    four = stream(States(), 3, size=4, start=Progress(3, 12), draft_accumulation_steps=1, **packing)
    assert documents(four.next_step().batches[0]) == flat[15]


def test_batches_do_not_depend_on_time(stream):
    late = np.random.default_rng(0)
    quick, slow = stream(States()), stream(States(delay_s=lambda: late.random() / 200))
    for _ in range(5):
        pairs = zip(quick.next_step().batches, slow.next_step().batches, strict=True)
        for one, other in pairs:
            assert vars(one).keys() == vars(other).keys()
            for name, value in vars(one).items():
                assert torch.equal(value, vars(other)[name]), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_for_a_gpu_are_pinned(stream):
    plain, pinned = stream(States()), stream(States(), device="cuda:0")
    for _ in range(5):
        pairs = zip(plain.next_step().batches, pinned.next_step().batches, strict=True)
        for one, other in pairs:
            moved = other.to("cuda:0", torch.float32)
            for name, value in vars(one).items():
                assert vars(other)[name].is_pinned(), name
                assert torch.equal(value, vars(moved)[name].cpu()), name


def test_asks_ahead_across_steps_and_no_further_than_the_end(stream):
    states = States()
    batches = stream(states, micro_batch_size=1)
    assert states.asked == []
    batches.next_step()
    wait_until(lambda: len(states.taken) == 4)  # two picked up, two ready: those of the next step
    time.sleep(0.05)
    assert len(states.asked) == 4
    for _ in range(4):
        batches.next_step()
    assert states.asked == [f"train-{position}.0" for position in range(10)]
    assert states.taken == states.asked
    with pytest.raises(IndexError, match="at its end"):
        batches.next_step()


def test_the_window_bounds_what_is_asked_for(stream):
    sampler = Sampler(LENGTHS, settings_of(), shuffle=True)
    tokens = [int(LENGTHS[sampler.samples_at(at)].sum()) for at in range(10)]
    states = States()
    batches = stream(
        states, num_steps=10, window_tokens=60, prefetch_depth=8, draft_accumulation_steps=1
    )
    for step in range(10):
        batches.next_step()
        ahead = tokens[step + 1 :]
        while sum(ahead) > 60:
            ahead.pop()
        expected = sum(len(sampler.samples_at(at)) for at in range(step + 1 + len(ahead)))
        wait_until(lambda: len(states.taken) == expected)  # noqa: B023 - called at once
        assert len(states.asked) == expected
    small = stream(States(), window_tokens=1)  # one micro-batch at a time always goes
    assert len(small.next_step().batches) == 2


def test_time_spent_elsewhere_is_not_waited_for(stream):
    states = States(delay_s=lambda: 0.02)
    batches = stream(states, num_steps=3)
    assert batches.next_step().wait_s > 0.02
    wait_until(lambda: len(states.taken) == len(states.asked) > 2)
    time.sleep(0.05)
    assert batches.next_step().wait_s < 0.02


def test_a_stop_ends_the_wait_soon(stream):
    states = States()
    states.answers.clear()
    batches = stream(states)
    start = time.monotonic()
    with pytest.raises(GaveUp, match="next micro-batch"):
        batches.next_step(give_up=lambda: True)
    assert time.monotonic() - start < 1


def test_an_error_comes_with_its_type_after_what_came_before(stream):
    refused = f"train-3.{len(Sampler(LENGTHS, settings_of(), True).samples_at(3)) - 1}"
    batches = stream(States(refused=refused), prefetch_depth=8)
    assert len(batches.next_step().batches) == 2
    for _ in range(2):
        with pytest.raises(SampleFailed, match=f"'{refused}': too long"):
            batches.next_step()


def test_an_error_while_asking_surfaces_too(stream):
    states = States()
    states.submit = lambda ticket, ids: (_ for _ in ()).throw(OSError("no route"))
    with pytest.raises(OSError, match="no route"):
        stream(states).next_step()


def test_a_finished_run_asks_for_nothing(stream):
    states = States()
    with pytest.raises(IndexError):
        stream(states, start=Progress(5, 10)).next_step()
    assert states.asked == []


@pytest.mark.parametrize(
    ("done", "per_step", "expected"),
    [(Progress(), 4, 5), (Progress(2, 8), 4, 5), (Progress(2, 8), 8, 4), (Progress(9, 20), 4, 9)],
)
def test_steps_cover_every_epoch(done, per_step, expected):
    config = training_config(num_epochs=2, micro_batch_size=1)
    sampler = Sampler(LENGTHS, config, shuffle=True)
    assert steps_of_run(config, sampler, per_step, done) == expected
    assert steps_of_run(training_config(num_train_steps=7), sampler, per_step, done) == 7


def test_packs_per_step():
    world = World(0, 4, torch.device("cpu"))
    assert packs_per_step(world, training_config(draft_accumulation_steps=2)) == 8
