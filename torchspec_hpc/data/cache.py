"""Directories of prepared data: named by what is in them, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from torchspec_hpc.data.report import DatasetReport
from torchspec_hpc.errors import ConfigError

#: Part of every key. Count up when the same input gives other samples than before.
CACHE_VERSION = 1


def cache_key(path: Path, **settings: Any) -> str:
    """Name of the samples that a file and settings give.

    Args:
        path: Its bytes count, its name does not.
        settings: All that the samples depend on; plain values.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    described = {"version": CACHE_VERSION, "file": digest.hexdigest(), "suffix": path.suffix}
    text = json.dumps(described | settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def new_cache(folder: Path) -> Iterator[CacheWriter]:
    """A writer for one directory of prepared data, under a temporary name till published.

    Args:
        folder: Its final name.

    Raises:
        ConfigError: The cache directory cannot be written.
    """
    name = f".{folder.name}.{os.uname().nodename}.{os.getpid()}.{time.monotonic_ns()}"
    temporary = folder.with_name(name)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache directory {folder.parent}: {error.strerror}",
            hint="set cache_dir to a directory on a disk that every node can write",
        ) from error
    try:
        yield CacheWriter(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # published, or of no use


class CacheWriter:
    """Streams samples into files; see :func:`new_cache`."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self._folder, self._temporary = folder, temporary
        self._ends = [0]
        self._input_ids = _NpyAppender(temporary / "input_ids.npy", np.dtype(np.int32))
        self._loss_mask = _NpyAppender(temporary / "loss_mask.npy", np.dtype(np.bool_))

    def append(self, input_ids: NDArray[np.int32], loss_mask: NDArray[np.bool_]) -> None:
        """Adds one sample."""
        self._input_ids.append(input_ids)
        self._loss_mask.append(loss_mask)
        self._ends.append(self._ends[-1] + len(input_ids))

    def publish(self, report: DatasetReport) -> None:
        """Completes the files and gives the directory its name, unless someone was faster."""
        self._input_ids.close()
        self._loss_mask.close()
        np.save(self._temporary / "offsets.npy", np.asarray(self._ends, dtype=np.int64))
        report.write(self._temporary / "report.json")
        try:
            self._temporary.rename(self._folder)
        except OSError:
            # a directory cannot be renamed over a full one: that one has the same content
            if not self._folder.is_dir():
                raise


class _NpyAppender:
    """A one-dimensional ``.npy`` file that grows."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._dtype, self._length = dtype, 0
        self._file = path.open("wb")
        self._write_header()
        self._header_bytes = self._file.tell()

    def append(self, values: NDArray[Any]) -> None:
        assert values.dtype == self._dtype
        self._file.write(values.tobytes())
        self._length += len(values)

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._header_bytes  # numpy leaves room for the length to grow
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        header = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self._length,),
        }
        npy.write_array_header_1_0(self._file, header)  # type: ignore[no-untyped-call]
