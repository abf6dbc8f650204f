from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from torchspec_hpc.data.vocab import count_supervised, coverage, draft_vocabulary
from torchspec_hpc.errors import ConfigError


def data(ids: list[int], said: list[int] | None = None) -> Any:
    """What these functions read of a dataset: two flat arrays."""
    mask = np.ones(len(ids), bool) if said is None else np.array(said, bool)
    return SimpleNamespace(input_ids=np.array(ids, np.int32), loss_mask=mask)


def test_the_most_frequent_supervised_ids_ascending() -> None:
    dataset = data([7, 7, 7, 5, 5, 9, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    kept = draft_vocabulary(dataset, 10, 3, [])
    assert kept.tolist() == [5, 7, 9]
    assert kept.dtype == np.int64
    assert coverage(dataset, 10, kept) == 1.0


def test_ties_and_ids_never_said_go_to_the_lower_id() -> None:
    assert draft_vocabulary(data([8, 6, 4, 2]), 10, 3, []).tolist() == [2, 4, 6]
    assert draft_vocabulary(data([9, 9]), 10, 4, []).tolist() == [0, 1, 2, 9]
    many = data(list(range(1000)) * 3 + list(range(500, 520)))
    assert draft_vocabulary(many, 1000, 70, []).tolist() == [*range(50), *range(500, 520)]


def test_special_ids_are_kept_however_rare() -> None:
    dataset = data([3] * 6 + [4] * 3 + [9])
    kept = draft_vocabulary(dataset, 10, 3, [9, 8, 9])
    assert kept.tolist() == [3, 8, 9]
    assert coverage(dataset, 10, kept) == 0.7


def test_the_whole_vocabulary() -> None:
    assert draft_vocabulary(data([3]), 10, 10, [2]).tolist() == list(range(10))


@pytest.mark.parametrize("size", [1, 11])
def test_a_size_that_cannot_be(size: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 2 special tokens to 10, the target's vocab"):
        draft_vocabulary(data([3]), 10, size, [1, 2])


@pytest.mark.parametrize("special", [10, -1])
def test_special_ids_of_another_model(special: int) -> None:
    with pytest.raises(ConfigError, match="do not belong together"):
        draft_vocabulary(data([3]), 10, 4, [special])


def test_token_ids_of_another_model() -> None:
    with pytest.raises(ConfigError, match="holds token id 12, the target's vocabulary is 10"):
        draft_vocabulary(data([3, 12]), 10, 4, [])


def test_counting_in_chunks() -> None:
    generator = np.random.default_rng(0)
    dataset = data(list(generator.integers(0, 50, 1001)), list(generator.integers(0, 2, 1001)))
    wanted = np.bincount(dataset.input_ids[dataset.loss_mask], minlength=50)
    for chunk in (1, 10, 1000, 10_000):
        np.testing.assert_array_equal(count_supervised(dataset, 50, chunk), wanted)
