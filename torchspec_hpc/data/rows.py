"""Rows of ``.jsonl``, ``.json`` and ``.parquet`` files, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.data.report import Rejection
from torchspec_hpc.errors import DataError

FORMATS = ".jsonl, .json, .parquet"
_CHUNK_CHARS = 1 << 18


class Row(NamedTuple):
    """A row as it is in the file.

    Attributes:
        line: Line of a JSONL file, number of the row elsewhere; counts from 1.
        value: What JSON or Parquet made of it.
    """

    line: int
    value: Any


def read_rows(path: Path) -> Iterator[Row | Rejection]:
    """Streams a data file; memory does not grow with its size.

    Args:
        path: A file whose suffix says its format. ``.json`` may hold one array or, as many files
            do, one object a line.

    Raises:
        DataError: The file is missing, of another format, or broken in a way that hides where its
            rows begin.
    """
    if not path.is_file():
        raise DataError(
            f"there is no data file {path}", hint="check the path in the dataset section"
        )
    match path.suffix:
        case ".jsonl":
            return _read_lines(path)
        case ".json":
            return _read_array(path) if _starts_array(path) else _read_lines(path)
        case ".parquet":
            return _read_parquet(path)
        case suffix:
            raise DataError(f"data file {path} has the suffix {suffix!r}", allowed=FORMATS)


def _read_lines(path: Path) -> Iterator[Row | Rejection]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield Rejection(line, f"not UTF-8: {error.reason} at byte {error.start}")
                continue
            if not text.strip():
                continue
            try:
                yield Row(line, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield Rejection(line, f"broken JSON: {error}")


def _starts_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1] == "["


def _read_array(path: Path) -> Iterator[Row | Rejection]:
    """Reads ``[row, row, ...]`` through a window; json.load would hold the whole file."""
    decoder = json.JSONDecoder()
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        window = file.read(_CHUNK_CHARS).lstrip().removeprefix("[").lstrip()
        while not window.startswith("]"):
            try:
                value, end = decoder.raw_decode(window)
                rest = window[end:].lstrip()
                if not rest.startswith((",", "]")):
                    raise json.JSONDecodeError("expected ',' or ']'", window, end)
            except (ValueError, RecursionError) as error:
                # an element that the window cuts looks broken until the window is larger
                if more := file.read(max(_CHUNK_CHARS, len(window))):
                    window = (window + more).lstrip()
                    continue
                raise DataError(
                    f"{path} is broken JSON in element {number + 1} of its array: {error}",
                    hint="rewrite it as .jsonl, one row a line: then only the bad rows are lost",
                ) from None
            number += 1
            yield Row(number, value)
            window = rest.removeprefix(",").lstrip()


def _read_parquet(path: Path) -> Iterator[Row | Rejection]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow, which is not installed",
            hint='pip install "torchspec_hpc[parquet]", or convert the file to .jsonl',
        ) from None
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, value)
    except pa.ArrowException as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error
