"""One line a step in ``metrics.jsonl``, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchspec_hpc.config.rundir import RunDir, write_atomic

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsWriter:
    """Writes the metrics of a run; a resumed run leaves no duplicated points.

    Args:
        run: The run.
        report_to: Names of back ends; ``tensorboard`` is known here.
        first_step: The first step that will be written.  What earlier attempts
            wrote from this step on is removed (TensorBoard: hidden).
        interval: TensorBoard gets every interval-th step, ``metrics.jsonl`` every step.
    """

    def __init__(
        self, run: RunDir, report_to: Sequence[str], first_step: int, interval: int = 1
    ) -> None:
        _cut(run.metrics, first_step)
        self._interval = interval
        self._file = run.metrics.open("a", encoding="ascii")
        self._board = (
            _open_board(run.tensorboard, first_step) if "tensorboard" in report_to else None
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step, flushed.

        Args:
            step: Optimizer steps done, counted from 1.
            values: Numbers by tag.  One that is not finite is written as null,
                which JSON knows, and is no point in TensorBoard.
        """
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        if self._board is not None and step % self._interval == 0:
            for tag, value in finite.items():
                if value is not None:
                    self._board.add_scalar(tag, value, step)
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _open_board(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and not always wanted

    return SummaryWriter(log_dir=str(folder), purge_step=first_step)


def _cut(path: Path, first_step: int) -> None:
    """Removes the lines from `first_step` on, and a last line that a kill left unfinished."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text(encoding="ascii").splitlines(keepends=True)
        if line.endswith("\n") and json.loads(line)["step"] < first_step
    ]
    write_atomic(path, "".join(kept))
