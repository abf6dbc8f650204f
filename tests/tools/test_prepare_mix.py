from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import prepare_mix as tool
import pytest

from tests.helpers import read_jsonl, write_jsonl


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    a = write_jsonl(tmp_path / "a.jsonl", [{"id": i, "text": f"a{i}"} for i in range(100)])
    a.write_text(a.read_text() + "{broken\n[1]\n")
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}", "source": "kept"} for i in range(40)])
    return [f"{a}=3", f"{b}=1"]


def run(tmp_path: Path, sources: list[str], *more: str) -> list[dict[str, Any]]:
    output = tmp_path / "mix.jsonl"
    assert tool.main([*sources, "--output", str(output), *more]) == 0
    return read_jsonl(output)


def test_shares_and_ids(tmp_path: Path, sources: list[str]) -> None:
    rows = run(tmp_path, sources, "--rows", "101")
    first = [row["text"].startswith("a") for row in rows]
    assert (sum(first), len(first) - sum(first)) == (76, 25)
    assert len({row["id"] for row in rows}) == 101
    assert rows[0]["source"].endswith("a.jsonl")
    assert {row["source"] for row in rows if row["text"].startswith("b")} == {"kept"}
    # the sources lie evenly
    assert all(2 <= sum(first[i : i + 4]) <= 4 for i in range(0, 96, 4))
    provenance = json.loads((tmp_path / "mix.jsonl.provenance.json").read_text())
    assert [(s["taken"], s["rows"], s["bad"]) for s in provenance["sources"]] == [
        (76, 100, 2),
        (25, 40, 0),
    ]


def test_the_seed_says_which(tmp_path: Path, sources: list[str]) -> None:
    one, again, other = (run(tmp_path, sources, "--rows", "60", "--seed", s) for s in "001")
    assert one == again != other


def test_all_that_the_weights_allow(tmp_path: Path, sources: list[str]) -> None:
    assert len(run(tmp_path, sources)) == 133


def test_too_few_rows(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*sources, "--output", str(tmp_path / "mix.jsonl"), "--rows", "999"]) == 2
    assert "it has 100" in capsys.readouterr().err
    assert not (tmp_path / "mix.jsonl").exists()


def write_table(path: Path, **columns: list[Any]) -> Path:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def test_dates_and_half_surrogates(tmp_path: Path) -> None:
    day = dt.datetime(2026, 1, 2, 3, tzinfo=dt.timezone.utc)
    dates = write_table(tmp_path / "a.parquet", text=["x"], day=[day], days=[[day.date()]])
    half = write_jsonl(tmp_path / "b.jsonl", [{"text": "\ud800 \u00f6"}])
    rows = run(tmp_path, [f"{dates}=1", f"{half}=1"])
    assert (rows[0]["day"], rows[0]["days"]) == ("2026-01-02T03:00:00+00:00", ["2026-01-02"])
    assert rows[1]["text"] == "\ud800 \u00f6"


def test_bytes_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path / "a.parquet", text=["x"], image=[{"bytes": b"png"}])
    assert tool.main([f"{path}=1", "--output", str(tmp_path / "mix.jsonl")]) == 2
    assert "the column image cannot be written as JSON: it has bytes" in capsys.readouterr().err


@pytest.mark.parametrize("rows", [99, 101])
def test_a_source_that_changes(
    tmp_path: Path,
    sources: list[str],
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_quotas = tool.set_quotas

    def set_quotas_late(*args: Any) -> None:
        set_quotas(*args)
        write_jsonl(tmp_path / "a.jsonl", [{"text": "new"}] * rows)

    monkeypatch.setattr(tool, "set_quotas", set_quotas_late)
    assert tool.main([*sources, "--output", str(tmp_path / "mix.jsonl")]) == 2
    assert "changed while it was read" in capsys.readouterr().err
    assert not list(tmp_path.glob("*mix*"))


def test_an_output_that_cannot_be(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main([*sources, "--output", str(tmp_path / "none" / "mix.jsonl")]) == 2
    assert "cannot make" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a.jsonl", "a.jsonl=x", "=1", "a.jsonl=0"])
def test_sources_that_cannot_be(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tool.main([text, "--output", str(tmp_path / "mix.jsonl")])
    assert "SOURCE=WEIGHT, weight above 0" in capsys.readouterr().err
