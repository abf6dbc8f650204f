"""Rows of data files, one at a time.

Reading and parsing are apart: one process reads, as many as there are cores parse. A line of JSON
is read as bytes; :func:`value_of` makes an object of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.data.report import BadRow
from torchspec_hpc.errors import DataError

FORMATS = (".jsonl", ".json", ".parquet", ".arrow")
_CHUNK_CHARS = 1 << 18
_BATCH_ROWS = 1024


class Row(NamedTuple):
    """A row as it is in the file.

    Attributes:
        line: Line of a JSONL file, number of the row elsewhere; counts from 1.
        value: The bytes of a line of JSON; elsewhere the object.
        num_bytes: Size, about.
    """

    line: int
    value: Any
    num_bytes: int


def read_rows(path: Path) -> Iterator[Row]:
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
        case ".parquet" | ".arrow":
            return _read_table(path)
        case suffix:
            raise DataError(
                f"data file {path} has the suffix {suffix!r}", allowed=", ".join(FORMATS)
            )


def value_of(row: Row) -> Any:
    """The object of a row.

    Raises:
        BadRow: The line is not UTF-8, or no JSON.
    """
    if not isinstance(row.value, bytes):
        return row.value
    try:
        return json.loads(row.value.decode("utf-8-sig" if row.line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"broken JSON: {error}") from None


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if raw.strip():
                yield Row(line, raw, len(raw))


def _starts_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1] == "["


def _read_array(path: Path) -> Iterator[Row]:
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
            yield Row(number, value, end)
            window = rest.removeprefix(",").lstrip()


def _read_table(path: Path) -> Iterator[Row]:
    """Parquet, and both of Arrow's own formats (Hugging Face datasets write the streamed one)."""
    try:
        import pyarrow as pa
    except ImportError:
        raise DataError(
            f"{path} needs pyarrow, which is not installed",
            hint='pip install "torchspec_hpc[parquet]", or convert the file to .jsonl',
        ) from None
    number = 0
    try:
        for batch in _record_batches(path):
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                rows = batch.slice(start, _BATCH_ROWS)
                mean_bytes = rows.nbytes // rows.num_rows
                for value in rows.to_pylist():
                    number += 1
                    yield Row(number, without_nulls(value), mean_bytes)
    except pa.ArrowException as error:
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
        raise DataError(f"{path} cannot be read as {kind}: {error}") from error


def _record_batches(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    if path.suffix == ".parquet":
        from pyarrow import parquet

        yield from parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)
        return
    with pa.memory_map(str(path)) as source:
        try:
            file = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            yield from pa.ipc.open_stream(source)
        else:
            yield from (file.get_batch(i) for i in range(file.num_record_batches))


def without_nulls(value: Any) -> Any:
    """Tables give every object the fields of all the others, as null."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
