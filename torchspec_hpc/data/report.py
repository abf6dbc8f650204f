"""What became of every row of a data set."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchspec_hpc.config.rundir import write_atomic

#: Beside the report: every bad row, a line of JSON each.
REJECTED = "rejected.jsonl"


class BadRow(ValueError):
    """A row that cannot be trained on.

    The message is ``kind`` or ``kind: detail``; reports are grouped by kind.
    """


class Rejection(NamedTuple):
    """A row that was left out.

    Attributes:
        file: Its data file.
        line: Of it; rows of Parquet, Arrow and JSON arrays count from 1.
        reason: Why.
    """

    file: str
    line: int
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


@dataclass
class DatasetReport:
    """Counts of one prepared data set.

    Attributes:
        num_rows: Rows read; every one is a sample or was rejected.
        num_samples: Rows that became samples.
        rejected: Rows left out, by kind of reason.
        examples: The first rejection of each kind.
        truncated: Samples cut at the longest sequence length.
        changed_answers: Earlier answers that the template shows otherwise than they were given:
            not supervised.
        num_tokens: Tokens of all samples.
        num_supervised: Those of them that the assistant said.
        num_text: Samples that are text without turns.
        num_all_supervised: Other samples of which every token is supervised.
        loss_mask: How the mask was found, in words.
        files: What was read.
    """

    num_rows: int = 0
    num_samples: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Rejection] = field(default_factory=dict)
    truncated: int = 0
    changed_answers: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_text: int = 0
    num_all_supervised: int = 0
    loss_mask: str = ""
    files: list[str] = field(default_factory=list)

    @property
    def num_rejected(self) -> int:
        """Rows left out."""
        return sum(self.rejected.values())

    @property
    def rejected_share(self) -> float:
        """Rejected rows by all rows."""
        return self.num_rejected / self.num_rows if self.num_rows else 0.0

    def reject(self, rejection: Rejection) -> None:
        """Counts one more bad row."""
        self.rejected[rejection.kind] = self.rejected.get(rejection.kind, 0) + 1
        self.examples.setdefault(rejection.kind, rejection)

    def write(self, path: Path) -> None:
        """Writes the report as JSON."""
        write_atomic(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> DatasetReport:
        """Reads what :meth:`write` wrote."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        data["examples"] = {kind: Rejection(*item) for kind, item in data["examples"].items()}
        return cls(**data)

    def summary(self) -> str:
        """One line for the log."""
        text = f" ({self.num_text} of them text without turns)" * bool(self.num_text)
        changed = f", {self.changed_answers} earlier answers left out" * bool(self.changed_answers)
        return (
            f"{self.num_samples} samples{text} of {self.num_rows} rows "
            f"({self.num_rejected} rejected, {self.truncated} truncated{changed}), "
            f"{self.num_tokens} tokens, {self.num_supervised} supervised; {self.loss_mask}"
        )

    def table(self, max_kinds: int = 8) -> str:
        """Reasons by frequency, with the first row of each."""
        lines = ["    rows  first at  reason"]
        counts = sorted(self.rejected.items(), key=lambda item: -item[1])
        for kind, count in counts[:max_kinds]:
            first = self.examples[kind]
            where = f"{Path(first.file).name}: " if len(self.files) > 1 else ""
            lines.append(
                f"{count:8d}  {first.line:8d}  {where}{' '.join(first.reason.split()):.300}"
            )
        if (more := len(counts) - max_kinds) > 0:
            lines.append(f"          and {more} more reasons")
        return "\n".join(lines)
