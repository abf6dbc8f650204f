"""Prepared data on disk: shards of samples, and an index that makes them a data set.

::

    <cache_dir>/<key>/shard_00000.safetensors   tokens and masks of some thousand rows
                      index.safetensors         where each sample is; written last
                      report.json rejected.jsonl

A shard follows from the data and its number alone, and appears whole: a preparation that was
stopped goes on with those that are missing, and two at once make the same files.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from torchspec_hpc.data.report import DatasetReport, Rejection
from torchspec_hpc.data.sample import Sample
from torchspec_hpc.errors import ConfigError, DataError

#: Part of every key. Count up when the same input gives other samples than before.
FORMAT_VERSION = 3
INDEX, REPORT = "index.safetensors", "report.json"

#: What is known of each sample, beside its tokens.
COLUMNS = {
    "length": np.int32,  # tokens
    "full_length": np.int32,  # before it was cut
    "supervised": np.int32,  # tokens
    "changed": np.int32,  # earlier answers that are not supervised
    "is_text": np.bool_,
    "file": np.int32,
    "line": np.int64,
    "id_hash": np.int64,  # 0: the row has no id
}
#: Columns of the index: those, and where the sample is.
_PLACE = {"shard": np.int32, "start": np.int64}


class Encoded(NamedTuple):
    """One sample on its way into a shard: int32 and bool ``[T]``, and a value of each column."""

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    columns: dict[str, Any]


def shard_path(folder: Path, number: int) -> Path:
    """File of a shard."""
    return folder / f"shard_{number:05d}.safetensors"


def write_shard(
    path: Path, samples: list[Encoded], rejected: list[Rejection], num_rows: int
) -> None:
    """Writes what became of some rows."""
    tensors: dict[str, NDArray[Any]] = {
        name: np.array([sample.columns[name] for sample in samples], dtype=dtype)
        for name, dtype in COLUMNS.items()
    }
    no_tokens = np.zeros(0, dtype=np.int32)
    tensors["input_ids"] = np.concatenate([no_tokens, *(s.input_ids for s in samples)])
    tensors["loss_mask"] = np.concatenate(
        [no_tokens.astype(np.bool_), *(s.loss_mask for s in samples)]
    )
    # one entry: the order of several would differ from call to call
    _write(path, tensors, {"rows": json.dumps({"num": num_rows, "rejected": rejected})})


def write_index(folder: Path, columns: dict[str, NDArray[Any]]) -> None:
    """Makes the shards of a folder a data set."""
    _write(folder / INDEX, columns, None)


def _write(path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str] | None) -> None:
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}",
            hint="set cache_dir to a directory on a disk that every node can write",
        ) from error


class Shard:
    """One shard; only what is asked for is read."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, "numpy")

    def column(self, name: str) -> NDArray[Any]:
        """A column of all its samples, or all its ``input_ids`` or ``loss_mask``."""
        return np.asarray(self._file.get_tensor(name))

    def tokens(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens and mask of a range."""
        ids, mask = (self._file.get_slice(name)[start:stop] for name in ("input_ids", "loss_mask"))
        return np.asarray(ids), np.asarray(mask)

    def rows(self) -> tuple[int, list[Rejection]]:
        """How many rows it was made of, and the bad ones."""
        rows = json.loads(self._file.metadata()["rows"])
        return rows["num"], [Rejection(*item) for item in rows["rejected"]]


class TokenDataset:
    """Samples of a prepared data set.

    Args:
        folder: Written by :func:`torchspec_hpc.data.dataset.prepare_dataset`.

    Attributes:
        folder: Likewise.
        key: Names the content: equal keys, equal samples.

    Raises:
        DataError: It is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.key = folder, folder.name
        try:
            index: Any = safe_open(folder / INDEX, "numpy")
            self._index = index
            self.lengths: NDArray[np.int32] = index.get_tensor("length")
            self._shard = index.get_tensor("shard")
            self._start = index.get_tensor("start")
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{folder} is no prepared data set: {error}",
                hint="delete it and prepare again: torchspec-hpc data prepare",
            ) from error
        self._shards: dict[int, Shard] = {}

    @cached_property
    def report(self) -> DatasetReport:
        """What became of each row."""
        return DatasetReport.read(self.folder / REPORT)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._start[index])
        shard = self._open(int(self._shard[index]))
        return Sample(index, *shard.tokens(start, start + int(self.lengths[index])))

    def column(self, name: str) -> NDArray[Any]:
        """A column of all samples, by its name in :data:`COLUMNS`."""
        return np.asarray(self._index.get_tensor(name))

    def supervised_tokens(self) -> Iterator[NDArray[np.int32]]:
        """All tokens that the assistant says, shard by shard, int32."""
        for number in np.unique(self._shard):
            shard = Shard(shard_path(self.folder, int(number)))
            chosen = self._shard == number
            mask = shard.column("loss_mask")
            kept = np.zeros(len(mask) + 1, dtype=np.int8)  # +1 where a sample begins, -1 behind it
            np.add.at(kept, self._start[chosen], 1)
            np.add.at(kept, self._start[chosen] + self.lengths[chosen], -1)
            yield shard.column("input_ids")[mask & (np.cumsum(kept[:-1]) > 0)]

    def _open(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(shard_path(self.folder, number))
        return self._shards[number]


def remove_leftovers(folder: Path, older_than_s: float = 3600.0) -> None:
    """Deletes what preparations that were killed left half written."""
    for path in folder.glob(".*.safetensors.*"):
        if time.time() - path.stat().st_mtime > older_than_s:
            path.unlink(missing_ok=True)
