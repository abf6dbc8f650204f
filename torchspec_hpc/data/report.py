"""What became of every row of a data file."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.config.rundir import write_atomic


class BadRow(ValueError):
    """A row that cannot be trained on.

    The message is ``kind`` or ``kind: detail``; reports are grouped by kind.
    """


class Rejection(NamedTuple):
    """A row that was left out: its line (rows of Parquet and JSON arrays count from 1), and why."""

    line: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


@dataclass
class DatasetReport:
    """Counts of one prepared data file.

    Attributes:
        num_rows: Rows read; every one is a sample or a rejection.
        num_samples: Rows that became samples.
        rejected: Rows left out.
        truncated: Samples cut at the longest sequence length.
        num_tokens: Tokens of all samples.
        num_supervised: Those of them that the assistant said.
        loss_mask: How the mask was found, in words.
    """

    num_rows: int = 0
    num_samples: int = 0
    rejected: list[Rejection] = field(default_factory=list)
    truncated: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    loss_mask: str = ""

    @property
    def rejected_share(self) -> float:
        """Rejected rows by all rows."""
        return len(self.rejected) / self.num_rows if self.num_rows else 0.0

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        write_atomic(path, asdict(self) | {"reasons": self._kinds()})

    @classmethod
    def read(cls, path: Path) -> DatasetReport:
        """Reads what :meth:`write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        del data["reasons"]
        data["rejected"] = [Rejection(*item) for item in data["rejected"]]
        return cls(**data)

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.num_samples} samples of {self.num_rows} rows "
            f"({len(self.rejected)} rejected, {self.truncated} truncated), "
            f"{self.num_tokens} tokens, {self.num_supervised} supervised; {self.loss_mask}"
        )

    def table(self, max_kinds: int = 8) -> str:
        """Reasons by frequency, with the first row of each."""
        first = {item.kind: item for item in reversed(self.rejected)}
        lines = ["    rows  first at  reason"]
        for kind, count in list(self._kinds().items())[:max_kinds]:
            reason = " ".join(first[kind].reason.split())
            lines.append(f"{count:8d}  {first[kind].line:8d}  {reason:.300}")
        if (more := len(first) - max_kinds) > 0:
            lines.append(f"          and {more} more reasons")
        return "\n".join(lines)

    def _kinds(self) -> dict[str, int]:
        return dict(Counter(item.kind for item in self.rejected).most_common())
