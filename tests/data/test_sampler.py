from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchspec_hpc.data.sampler import Sampler, positions_of

samplers = st.builds(Sampler, st.integers(1, 40), seed=st.integers(0, 2**63), shuffle=st.booleans())
small = st.integers(1, 5)
#: Of ten samples, seed 1234, two epochs.
ORDER = [5, 6, 3, 9, 7, 4, 1, 2, 8, 0, 9, 2, 0, 7, 6, 1, 8, 4, 5, 3]


@given(samplers, st.integers(0, 1000))
def test_an_epoch_takes_every_sample_once(sampler: Sampler, epoch: int) -> None:
    start = epoch * sampler.num_samples
    indices = [sampler.index_at(start + i) for i in range(sampler.num_samples)]
    assert sorted(indices) == list(range(sampler.num_samples))
    if not sampler.shuffle:
        assert indices == sorted(indices)


@given(samplers, st.integers(0, 200))
def test_resuming_gives_the_rest_of_an_uninterrupted_run(sampler: Sampler, cursor: int) -> None:
    whole = [sampler.index_at(i) for i in range(cursor + 50)]
    resumed = Sampler(sampler.num_samples, sampler.seed, sampler.shuffle)
    assert [resumed.index_at(i) for i in range(cursor, cursor + 50)] == whole[cursor:]


@given(st.integers(0, 10**9), small, small, small)
def test_a_step_takes_each_position_once_however_it_is_cut(
    cursor: int, world_size: int, micro_batch_size: int, num_micro_batches: int
) -> None:
    ranks = [
        positions_of(cursor, world_size, rank, micro_batch_size, num_micro_batches)
        for rank in range(world_size)
    ]
    for micro_batches in ranks:
        assert [len(positions) for positions in micro_batches] == (
            [micro_batch_size] * num_micro_batches
        )
    taken = [position for rank in ranks for positions in rank for position in positions]
    size = world_size * micro_batch_size * num_micro_batches
    assert sorted(taken) == list(range(cursor, cursor + size))


def test_epochs_and_seeds_have_their_own_order() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = Sampler(100, seed, True)
        return tuple(sampler.index_at(100 * epoch + i) for i in range(100))

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_the_order_is_the_same_for_ever() -> None:
    """A run resumed with another numpy must go on in the same order."""
    sampler = Sampler(10, 1234, True)
    assert [sampler.index_at(i) for i in range(20)] == ORDER


@pytest.mark.parametrize(("num_samples", "seed"), [(0, 0), (5, -1)])
def test_impossible_samplers(num_samples: int, seed: int) -> None:
    with pytest.raises(ValueError, match="allowed: num_samples >= 1, seed >= 0"):
        Sampler(num_samples, seed, True)


def test_a_negative_position() -> None:
    with pytest.raises(ValueError, match="position = -1"):
        Sampler(5, 0, True).index_at(-1)
