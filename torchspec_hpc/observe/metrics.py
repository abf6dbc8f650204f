"""One line a step in ``metrics.jsonl``, and the same numbers for whoever draws them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torchspec_hpc.config import Config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.observe.wandb_board import WandbBoard

logger = logging.getLogger(__name__)


class Board(Protocol):
    """Something that draws curves."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the values of one step, all of them finite."""

    def close(self, *, failed: bool) -> None:
        """Ends this attempt."""


class MetricsWriter:
    """Writes the metrics of a run; a resumed run leaves no duplicated points.

    Args:
        config: Says which boards there are; they get every ``log_interval``-th step,
            ``metrics.jsonl`` gets every step.
        run: The run.
        first_step: The first step that will be written.  What earlier attempts
            wrote from this step on is removed (TensorBoard: hidden; W&B: stays, and
            is not sent again).

    Raises:
        ConfigError: W&B is asked for and cannot be used; after the first step that is a warning.
    """

    def __init__(self, config: Config, run: RunDir, first_step: int) -> None:
        self._interval = config.logging.log_interval
        self._boards: list[Board] = []
        if "tensorboard" in config.logging.report_to:
            self._boards.append(TensorBoard(run.tensorboard, first_step))
        if "wandb" in config.logging.report_to:
            try:
                self._boards.append(WandbBoard(config, run))
            except ConfigError as error:
                if first_step == 1:
                    raise
                # it worked before: an outage of W&B must not end a run that was requeued
                logger.warning("no W&B in this attempt: %s", error)
        _cut(run.metrics, first_step)
        self._file = run.metrics.open("a", encoding="ascii")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of one step, flushed.

        Args:
            step: Optimizer steps done, counted from 1.
            values: Numbers by tag.  One that is not finite is written as null,
                which JSON knows, and is no point on a board.
        """
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        line = {"step": step} | {tag: finite.get(tag) for tag in values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if step % self._interval == 0:
            for board in self._boards:
                board.write(step, finite)

    def close(self, *, failed: bool) -> None:
        """Flushes and closes everything.

        Args:
            failed: An error ends this attempt.
        """
        self._file.close()
        for board in self._boards:
            board.close(failed=failed)


class TensorBoard:
    """Event files for TensorBoard.

    Args:
        folder: Of all attempts.
        first_step: Points of earlier attempts from this step on are hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, not always wanted

        self._writer = SummaryWriter(log_dir=str(folder), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of a step, flushed."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - TensorBoard shows no outcome
        """Closes the event file."""
        self._writer.close()


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
