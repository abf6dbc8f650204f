from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from torchspec_hpc.data.shards import (
    COLUMNS,
    Encoded,
    TokenDataset,
    shard_path,
    write_index,
    write_shard,
)
from torchspec_hpc.data.vocab import count_supervised, coverage, draft_vocabulary
from torchspec_hpc.errors import ConfigError

Data = Callable[..., TokenDataset]


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Prepares tokens, ten to a sample, a hundred to a shard."""

    def prepare(given: list[int], said: list[int] | None = None) -> TokenDataset:
        folder = tmp_path / "prepared"
        folder.mkdir(exist_ok=True)
        ids, mask = np.array(given, np.int32), np.array(said or [1] * len(given), np.bool_)
        zeros = dict.fromkeys(COLUMNS, 0)
        places: list[tuple[int, int, int]] = []
        for shard, first in enumerate(range(0, len(ids), 100)):
            starts = range(first, min(first + 100, len(ids)), 10)
            samples = [Encoded(ids[s : s + 10], mask[s : s + 10], zeros) for s in starts]
            write_shard(shard_path(folder, shard), samples, [], len(samples))
            places += [(shard, s - first, len(ids[s : s + 10])) for s in starts]
        columns = zip(("shard", "start", "length"), np.array(places).T, strict=True)
        write_index(folder, {name: np.ascontiguousarray(values) for name, values in columns})
        return TokenDataset(folder)

    return prepare


def test_the_most_frequent_supervised_ids_ascending(data: Data) -> None:
    dataset = data([7, 7, 7, 5, 5, 9, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    kept = draft_vocabulary(dataset, 10, 3, [])
    assert kept.tolist() == [5, 7, 9]
    assert kept.dtype == np.int64
    assert coverage(count_supervised(dataset, 10), kept) == 1.0


def test_ties_and_ids_never_said_go_to_the_lower_id(data: Data) -> None:
    assert draft_vocabulary(data([8, 6, 4, 2]), 10, 3, []).tolist() == [2, 4, 6]
    assert draft_vocabulary(data([9, 9]), 10, 4, []).tolist() == [0, 1, 2, 9]
    many = data(list(range(1000)) * 3 + list(range(500, 520)))
    assert draft_vocabulary(many, 1000, 70, []).tolist() == [*range(50), *range(500, 520)]


def test_special_ids_are_kept_however_rare(data: Data) -> None:
    dataset = data([3] * 6 + [4] * 3 + [9])
    kept = draft_vocabulary(dataset, 10, 3, [9, 8, 9])
    assert kept.tolist() == [3, 8, 9]
    assert coverage(count_supervised(dataset, 10), kept) == 0.7


def test_the_whole_vocabulary(data: Data) -> None:
    assert draft_vocabulary(data([3]), 10, 10, [2]).tolist() == list(range(10))


@pytest.mark.parametrize("size", [1, 11])
def test_a_size_that_cannot_be(data: Data, size: int) -> None:
    with pytest.raises(ConfigError, match="allowed: 2 special tokens to 10, the target's vocab"):
        draft_vocabulary(data([3]), 10, size, [1, 2])


@pytest.mark.parametrize("special", [10, -1])
def test_special_ids_of_another_model(data: Data, special: int) -> None:
    with pytest.raises(ConfigError, match="do not belong together"):
        draft_vocabulary(data([3]), 10, 4, [special])


def test_token_ids_of_another_model(data: Data) -> None:
    with pytest.raises(ConfigError, match="holds token id 12, the target's vocabulary is 10"):
        draft_vocabulary(data([3, 12]), 10, 4, [])


def test_counting_shard_by_shard(data: Data) -> None:
    generator = np.random.default_rng(0)
    ids, said = generator.integers(0, 50, 1001), generator.integers(0, 2, 1001)
    wanted = np.bincount(ids[said == 1], minlength=50)
    np.testing.assert_array_equal(count_supervised(data(ids.tolist(), said.tolist()), 50), wanted)
