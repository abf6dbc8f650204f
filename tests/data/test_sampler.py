from __future__ import annotations

import threading
from queue import Queue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import training_config
from torchspec_hpc.data.packing import Packs
from torchspec_hpc.data.sampler import Sampler, positions_of
from torchspec_hpc.errors import ConfigError

small = st.integers(1, 5)
packings = st.one_of(
    st.builds(lambda n: {"micro_batch_tokens": n}, st.integers(20, 60)),
    st.builds(lambda n: {"micro_batch_size": n}, st.integers(1, 4)),
)
#: Of ten samples, seed 1234, two epochs.
ORDER = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0, 9, 2, 0, 7, 6, 1, 8, 4, 5, 3]
#: Of ten samples of 1 to 10 tokens in packs of 16, seed 1234, one epoch.
PACKS = [[3, 1, 0], [5, 9], [7, 4, 2], [6, 8]]


def make(lengths, seed=0, shuffle=True, **packing: object) -> Sampler:
    return Sampler(np.array(lengths), training_config(seed=seed, **packing), shuffle)


samplers = st.builds(
    lambda lengths, seed, shuffle, packing: make(lengths, seed, shuffle, **packing),
    st.lists(st.integers(1, 20), min_size=1, max_size=30),
    st.integers(0, 2**63),
    st.booleans(),
    packings,
)


def flat(sampler: Sampler, start: int, end: int) -> list[int]:
    return [int(i) for at in range(start, end) for i in sampler.samples_at(at)]


@given(samplers, st.integers(0, 20))
def test_an_epoch_takes_every_sample_once(sampler: Sampler, epoch: int):
    start, end = sampler.end_of(epoch), sampler.end_of(epoch + 1)
    indices = flat(sampler, start, end)
    assert sorted(indices) == list(range(len(sampler._lengths)))
    if not sampler._shuffle:
        assert indices == sorted(indices)
    for at in range(start, end):
        assert 0 < sampler._lengths[sampler.samples_at(at)].sum() <= sampler.longest_pack


@given(samplers, st.integers(0, 100))
def test_resuming_gives_the_rest_of_an_uninterrupted_run(sampler: Sampler, cursor: int):
    whole = [list(sampler.samples_at(at)) for at in range(cursor + 20)]
    resumed = Sampler(sampler._lengths, sampler._config, sampler._shuffle)
    backwards = [list(resumed.samples_at(at)) for at in reversed(range(cursor, cursor + 20))]
    assert backwards[::-1] == whole[cursor:]


@given(samplers)
def test_epochs_are_counted_in_packs(sampler: Sampler):
    ends = [sampler.end_of(epoch) for epoch in range(4)]
    assert [sampler.epochs_at(end) for end in ends] == [0, 1, 2, 3]
    values = [sampler.epochs_at(cursor) for cursor in range(ends[-1])]
    assert values == sorted(values)
    assert all(int(sampler.epochs_at(end - 1)) == epoch for epoch, end in enumerate(ends[1:]))


@given(st.integers(0, 10**9), small, small)
def test_a_step_takes_each_position_once_however_it_is_cut(
    cursor: int, world_size: int, num_micro_batches: int
):
    ranks = [
        positions_of(cursor, world_size, rank, num_micro_batches) for rank in range(world_size)
    ]
    # micro-batch by micro-batch, rank by rank
    taken = [position for micro_batch in zip(*ranks, strict=True) for position in micro_batch]
    assert taken == list(range(cursor, cursor + world_size * num_micro_batches))


@pytest.mark.parametrize("packing", [{"micro_batch_size": 1}, {"micro_batch_tokens": 40}])
def test_epochs_and_seeds_have_their_own_order(packing):
    lengths = 1 + np.arange(100) % 20

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = make(lengths, seed, **packing)
        return tuple(flat(sampler, sampler.end_of(epoch), sampler.end_of(epoch + 1)))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_packs_do_not_come_in_the_order_in_which_they_were_filled():
    """Best fit leaves the loose packs last: training on those together would be a pattern."""
    sampler = make(1 + np.arange(1000) % 20, micro_batch_tokens=24)
    longest = [max(sampler._lengths[sampler.samples_at(at)]) for at in range(sampler.end_of(1))]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


def test_the_order_is_the_same_for_ever():
    """A run resumed with another numpy must go on in the same order."""
    assert flat(make([1] * 10, seed=1234, micro_batch_size=1), 0, 20) == ORDER
    packed = make(range(1, 11), seed=1234, micro_batch_tokens=16)
    assert [list(packed.samples_at(at)) for at in range(packed.end_of(1))] == PACKS


def test_the_next_epoch_is_packed_before_it_begins(monkeypatch: pytest.MonkeyPatch):
    asked: Queue[tuple[int, int]] = Queue()
    pack = Sampler._pack_epoch

    def noted(self: Sampler, epoch: int) -> Packs:
        asked.put((epoch, threading.get_ident()))
        return pack(self, epoch)

    monkeypatch.setattr(Sampler, "_pack_epoch", noted)
    sampler = make(range(1, 11), micro_batch_tokens=16)
    sampler.samples_at(0)
    found = [asked.get(timeout=10) for _ in range(2)]
    assert [epoch for epoch, _ in found] == [0, 1]
    assert threading.get_ident() not in {thread for _, thread in found}
    sampler.samples_at(sampler.end_of(1))
    assert asked.get(timeout=10)[0] == 2
    assert asked.empty()


def test_impossible_packs():
    with pytest.raises(ConfigError, match="less than the longest sample, 30 tokens"):
        make([30, 5], micro_batch_tokens=16)


def test_a_negative_position():
    with pytest.raises(ValueError, match="position = -1"):
        make([5], micro_batch_size=1).samples_at(-1)
