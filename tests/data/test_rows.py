from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from torchspec_hpc.data import rows as rows_module
from torchspec_hpc.data.report import Rejection
from torchspec_hpc.data.rows import Row, read_rows
from torchspec_hpc.errors import DataError

OBJECTS = [{"id": i, "text": "x" * i, "nested": {"ö": ["}", None, "],"]}} for i in range(50)]


def test_jsonl_names_the_line_of_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n{"a": "\xff"}\r\n  \n{"a": 2}')
    first, broken, not_utf8, last = read_rows(path)
    assert first == Row(1, {"a": 1})
    assert isinstance(broken, Rejection)
    assert broken.line == 3
    assert broken.reason.startswith("broken JSON: Expecting value")
    assert not_utf8 == Rejection(4, "not UTF-8: invalid start byte at byte 7")
    assert last == Row(6, {"a": 2})


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(read_rows(path)) == [Row(1, {"a": 1}), Row(2, {"a": 2})]


@pytest.mark.parametrize("chunk", [7, 64, 1 << 18])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_any_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, indent: int | None
) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK_CHARS", chunk)
    path = tmp_path / "a.json"
    path.write_text(" " + json.dumps(OBJECTS, indent=indent) + "\n")
    assert list(read_rows(path)) == [Row(i, row) for i, row in enumerate(OBJECTS, start=1)]


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


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(OBJECTS), path)
    assert list(read_rows(path)) == [Row(i, row) for i, row in enumerate(OBJECTS, start=1)]


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
