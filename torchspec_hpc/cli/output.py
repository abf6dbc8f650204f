"""Tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

#: Columns of a table that no terminal shows.
_FILE_WIDTH = 200
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    """Prints plain data."""
    print(json.dumps(value, indent=2))


def print_table(columns: Mapping[str, Sequence[object]], title: str | None = None) -> None:
    """Prints columns of the same length; None is shown as ``-``."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(format_value(value) for value in row))
    Console(width=None if sys.stdout.isatty() else _FILE_WIDTH).print(table)


def format_value(value: object) -> str:
    """A cell of a table."""
    if value is None or value == "":
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_bytes(num_bytes: float | None) -> str:
    """Such as ``1.5 GiB``."""
    if num_bytes is None:
        return "-"
    size, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.4g} {unit}"
