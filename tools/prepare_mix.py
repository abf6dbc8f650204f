#!/usr/bin/env python3
"""Mix data sets by weight into one JSONL file.

    python tools/prepare_mix.py --output mix.jsonl --rows 100000 chat.jsonl=0.7 code.parquet=0.3

A source is a file, a directory, or ``hf://organisation/name``; its rows keep all their columns, get
a ``source`` if they have none, and an id that no other source has. Which rows are taken depends on
``--seed`` and the sources alone: each is read twice, once to count and once to copy, so memory does
not grow with them. Sources lie evenly in the output; training shuffles it again. Rows that are no
JSON objects are left out, counted and named; dates are written as ISO 8601, a column of bytes is an
error. ``OUTPUT.provenance.json`` says what was taken.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.data.report import BadRow
from torchspec_hpc.data.rows import read_rows, value_of
from torchspec_hpc.data.sources import files_of, signature
from torchspec_hpc.errors import DataError, UserError, exit_code_of

logger = logging.getLogger("prepare_mix")


@dataclass
class Source:
    """One data set of the mix.

    Attributes:
        name: As given.
        weight: Share of the output, before all are made to sum to one.
        num_rows: Good rows that it has.
        num_bad: Others.
        quota: Rows to take.
        files: Read twice.
        signatures: Of the files before they were read.
    """

    name: str
    weight: float
    num_rows: int = 0
    num_bad: int = 0
    quota: int = 0
    files: list[Path] = field(default_factory=list)
    signatures: list[tuple[int, int, int]] = field(default_factory=list)

    def count(self) -> None:
        """Reads it once.

        Raises:
            DataError: There is nothing to read, or it cannot be written as JSON.
        """
        self.files = files_of(self.name)
        self.signatures = [signature(path) for path in self.files]
        bad: list[str] = []
        self.num_rows = sum(1 for _ in self.rows(bad))
        self.num_bad = len(bad)
        for reason in bad[:10]:
            logger.warning("left out: %s", reason)

    def rows(self, bad: list[str]) -> Iterator[dict[str, Any]]:
        """Its good rows, with ids and a source; reasons of the others go into a list."""
        for index, path in enumerate(self.files):
            for row in read_rows(path):
                try:
                    value = value_of(row)
                    if not isinstance(value, dict):
                        raise BadRow(f"not an object: found {type(value).__name__}")
                    if path.suffix in (".parquet", ".arrow"):
                        value = as_json(value, path)
                except BadRow as error:
                    bad.append(f"{path} line {row.line}: {error}")
                    continue
                key = value.get("id")
                key = f"{index}.{row.line}" if key is None else key
                yield {"source": self.name, **value, "id": f"{self.name}/{key}"}

    def chosen(self, seed: int, number: int) -> Iterator[dict[str, Any]]:
        """`quota` of its rows, in their order."""
        bits = np.random.PCG64(np.random.SeedSequence((seed, number))).random_raw(self.num_rows)
        taken = np.zeros(self.num_rows, dtype=np.bool_)
        taken[np.argsort(bits, kind="stable")[: self.quota]] = True
        # not strict: require_unchanged() tells of files that grew or shrank
        for row, wanted in zip(self.rows([]), taken, strict=False):
            if wanted:
                yield row

    def require_unchanged(self) -> None:
        """The two readings must have seen the same rows.

        Raises:
            DataError: A file was written to.
        """
        if [signature(path) for path in self.files] != self.signatures:
            raise DataError(
                f"{self.name} changed while it was read",
                hint="wait until it is written, and try again",
            )


def as_json(row: dict[str, Any], path: Path) -> dict[str, Any]:
    """A row of a table as plain values.

    Raises:
        DataError: A column has values that JSON has no form for.
    """
    for column, value in row.items():
        try:
            row[column] = json.loads(json.dumps(value, default=_as_text))
        except TypeError as error:  # noqa: PERF203
            raise DataError(
                f"{path}: the column {column} cannot be written as JSON: {error}",
                allowed="text, numbers, dates, lists and objects",
                hint="leave the column out of the file, images and sounds are not trained on",
            ) from None
    return row


def _as_text(value: Any) -> str:
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    raise TypeError(f"it has {type(value).__name__}")


def set_quotas(sources: list[Source], num_rows: int | None) -> None:
    """Divides the output among sources; without a number as many as the weights allow.

    Raises:
        DataError: A source has too few rows.
    """
    total = sum(source.weight for source in sources)
    if num_rows is None:
        num_rows = min(int(s.num_rows * total / s.weight) for s in sources)
    exact = [num_rows * source.weight / total for source in sources]
    for source, share in zip(sources, exact, strict=True):
        source.quota = int(share)
    by_rest = sorted(range(len(sources)), key=lambda i: (exact[i] % 1, -i), reverse=True)
    for i in by_rest[: num_rows - sum(source.quota for source in sources)]:
        sources[i].quota += 1
    for source in sources:
        if source.quota > source.num_rows:
            raise DataError(
                f"{source.quota} rows of {source.name} are wanted, it has {source.num_rows}",
                hint="lower --rows or its weight, or leave --rows out to take what there is",
            )


def mix(sources: list[Source], seed: int) -> Iterator[dict[str, Any]]:
    """All chosen rows; next comes the source that lags most behind its share."""
    streams = [source.chosen(seed, number) for number, source in enumerate(sources)]
    written = [0] * len(sources)
    for _ in range(sum(source.quota for source in sources)):
        open_ones = [i for i, source in enumerate(sources) if written[i] < source.quota]
        i = min(open_ones, key=lambda i: ((written[i] + 0.5) / sources[i].quota, i))
        written[i] += 1
        if (row := next(streams[i], None)) is None:
            sources[i].require_unchanged()
            raise AssertionError(f"{sources[i].name} has fewer rows than were counted")
        yield row


def write(sources: list[Source], seed: int, output: Path) -> None:
    """Writes the mix; all of it or nothing.

    Raises:
        DataError: A source changed meanwhile, or the file cannot be made.
    """
    temporary = output.with_name(f".{output.name}.part")
    try:
        # half of a surrogate pair, which UTF-8 cannot take, becomes JSON's own escape
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in mix(sources, seed):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for source in sources:
            source.require_unchanged()
        temporary.replace(output)
    except OSError as error:
        raise DataError(f"cannot make {output}: {error}", hint="check --output") from error
    finally:
        temporary.unlink(missing_ok=True)


def parse_source(text: str) -> Source:
    """``NAME=WEIGHT``."""
    name, _, weight = text.rpartition("=")
    try:
        source = Source(name, float(weight))
    except ValueError:
        source = Source(text, 0.0)
    if not name or not source.weight > 0:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: SOURCE=WEIGHT, weight above 0")
    return source


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=parse_source, metavar="SOURCE=WEIGHT")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="of the output; default: as many as there are")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        for source in args.sources:
            source.count()
        set_quotas(args.sources, args.rows)
        write(args.sources, args.seed, args.output)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return exit_code_of(error)
    taken = [
        {
            "source": s.name,
            "weight": s.weight,
            "taken": s.quota,
            "rows": s.num_rows,
            "bad": s.num_bad,
        }
        for s in args.sources
    ]
    provenance = args.output.with_name(f"{args.output.name}.provenance.json")
    write_atomic(provenance, {"seed": args.seed, "sources": taken})
    for entry in taken:
        print("{taken:8d} of {rows:8d} rows ({bad} bad)  {source}".format(**entry))
    return 0


if __name__ == "__main__":
    sys.exit(main())
