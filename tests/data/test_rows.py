from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspec_hpc.data import rows as rows_module
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.rows import read_rows, value_of
from torchspec_hpc.errors import DataError

OBJECTS = [{"id": i, "text": "x" * i, "nested": {"ö": ["}", None, "],"]}} for i in range(50)]


def test_jsonl_names_the_line_of_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": "\xff"}\r\n  \n{"a": 2}')
    first, broken, not_utf8, last = read_rows(path)
    assert value_of(first) == {"a": 1}
    with pytest.raises(BadRow, match=r"^broken JSON: Expecting value"):
        value_of(broken)
    with pytest.raises(BadRow, match=r"^not UTF-8: invalid start byte at byte 7$"):
        value_of(not_utf8)
    assert value_of(last) == {"a": 2}
    assert [row.line for row in (first, broken, not_utf8, last)] == [1, 3, 4, 6]


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [value_of(row) for row in read_rows(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK_CHARS", chunk)
    path = tmp_path / "a.json"
    path.write_text(" " + json.dumps(OBJECTS, indent=indent) + "\n")
    found = list(read_rows(path))
    assert [row[:2] for row in found] == list(enumerate(OBJECTS, start=1))
    whole = path.stat().st_size  # two bytes a row are between them; spaces, if there are any
    assert whole * 0.9 <= sum(row.num_bytes + 2 for row in found) <= whole * 1.1


def test_an_empty_array(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(" [ ] ")
    assert list(read_rows(path)) == []


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a" 2}]', '[{"a": 1}, {"a": 2}', '[{"a": 1}, '])
def test_a_broken_array_names_the_element(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"broken JSON in element 2 of its array(.|\n)*\.jsonl"):
        list(read_rows(path))


def write_parquet(path: Path, table: Any) -> None:
    from pyarrow import parquet

    parquet.write_table(table, path)


def write_arrow_file(path: Path, table: Any) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)


def write_arrow_stream(path: Path, table: Any) -> None:
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("parquet", write_parquet), ("arrow", write_arrow_file), ("arrow", write_arrow_stream)],
)
def test_tables(tmp_path: Path, suffix: str, write: Callable[[Path, Any], None]) -> None:
    import pyarrow as pa

    path = tmp_path / f"a.{suffix}"
    rows = [{"m": [{"a": "1"}, {"a": "2"}], "id": None}, {"m": None, "id": "x"}] * 1000
    write(path, pa.Table.from_pylist(rows))
    found = list(read_rows(path))
    # fields that only other rows have are not there
    assert [row[:2] for row in found] == [
        (i, {key: value for key, value in row.items() if value is not None})
        for i, row in enumerate(rows, start=1)
    ]
    assert all(row.num_bytes > 0 for row in found)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"torchspec_hpc\[parquet\]"):
        list(read_rows(tmp_path / "a.parquet"))


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("PAR2")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        list(read_rows(tmp_path / "a.parquet"))


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"suffix '.csv'\n  allowed: .jsonl, .json, .parquet"):
        read_rows(tmp_path / "a.csv")
