from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.tiny import training_config
from torchspec_hpc.data.packing import WINDOW, Packs, best_fit, in_groups, longest_pack, next_fit
from torchspec_hpc.errors import ConfigError

MAX_TOKENS = 50
some_lengths = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60).map(np.array)


def chat_lengths(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(64, 1025, num).astype(np.int32)


def tokens(packs: Packs, lengths: np.ndarray) -> list[int]:
    return [int(lengths[packs[i]].sum()) for i in range(len(packs))]


@given(some_lengths, st.integers(0, 2**32), st.sampled_from([best_fit, next_fit]))
def test_every_sample_lies_in_one_pack_and_none_is_too_long(lengths, seed, fit):
    order = np.random.default_rng(seed).permutation(len(lengths))
    packs = fit(lengths, order, MAX_TOKENS)
    assert sorted(packs.samples) == list(range(len(lengths)))
    filled = tokens(packs, lengths)
    assert 0 < min(filled) <= max(filled) <= MAX_TOKENS
    again = fit(lengths.copy(), order.copy(), MAX_TOKENS)
    assert np.array_equal(again.samples, packs.samples)
    assert np.array_equal(again.offsets, packs.offsets)


@given(some_lengths, st.integers(0, 2**32))
def test_reordered_packs_are_the_same_packs(lengths, seed):
    packs = best_fit(lengths, np.arange(len(lengths)), MAX_TOKENS)
    order = np.random.default_rng(seed).permutation(len(packs))
    moved = packs.reordered(order)
    assert [list(moved[i]) for i in range(len(packs))] == [list(packs[i]) for i in order]


@given(some_lengths)
def test_next_fit_ends_a_pack_only_where_it_must(lengths):
    packs = next_fit(lengths, np.arange(len(lengths)), MAX_TOKENS)
    assert np.array_equal(packs.samples, np.arange(len(lengths)))
    filled = tokens(packs, lengths)
    for pack in range(len(packs) - 1):
        assert filled[pack] + lengths[packs[pack + 1][0]] > MAX_TOKENS


def test_groups_count_samples():
    packs = in_groups(np.array([4, 2, 0, 1, 3]), 2)
    assert [list(packs[i]) for i in range(len(packs))] == [[4, 2], [0, 1], [3]]


@pytest.mark.parametrize("num", [600, WINDOW + 1, 100_000])
def test_chat_data_fill_their_packs(num):
    lengths = chat_lengths(num)
    packs = best_fit(lengths, np.arange(num), 4096)
    assert 1 - lengths.sum() / (len(packs) * 4096) <= 0.03


def test_a_million_samples_take_seconds():
    lengths = chat_lengths(1_000_000)
    start = time.process_time()
    best_fit(lengths, np.arange(len(lengths)), 4096)
    assert time.process_time() - start < 5


def test_the_packs_are_the_same_for_ever():
    """A resumed run must go on with the packs that it began with."""
    lengths = np.array([7, 3, 9, 1, 4, 4, 2, 8, 5, 6])
    packs = best_fit(lengths, np.arange(10)[::-1], 12)
    assert [list(packs[i]) for i in range(len(packs))] == [[2, 1], [7, 5], [8, 0], [9, 6, 4], [3]]


def test_the_longest_pack():
    lengths = np.array([30, 20, 10], dtype=np.int32)
    assert longest_pack(lengths, training_config(micro_batch_tokens=40)) == 40
    assert longest_pack(lengths, training_config(micro_batch_tokens=100)) == 60
    assert longest_pack(lengths, training_config(micro_batch_size=2)) == 60
    assert longest_pack(lengths, training_config(micro_batch_size=9)) == 90


def test_a_sample_that_fits_into_no_pack():
    message = (
        r"micro_batch_tokens = 16 is less than the longest sample, 30 tokens\n"
        r"  allowed: .* at least 30\n  next: .*training.max_seq_length"
    )
    with pytest.raises(ConfigError, match=message):
        longest_pack(np.array([30, 5]), training_config(micro_batch_tokens=16))
