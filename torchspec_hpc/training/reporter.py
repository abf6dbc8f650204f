"""What a run says of each step: to files and dashboards, and in a line for people."""

from __future__ import annotations

import logging

from typing_extensions import Self

from torchspec_hpc.config import Config, RunDir
from torchspec_hpc.observe.metrics import MetricsWriter
from torchspec_hpc.training.meter import EngineMonitor

logger = logging.getLogger(__name__)


class Reporter:
    """Of the main rank: the numbers that it is handed are those of all ranks.

    Args:
        config: Of the run.
        run: Its directory.
        monitor: Of the engines.
        first_step: The first step that will be reported.
        num_steps: The optimizer step at which the run ends.
    """

    def __init__(
        self, config: Config, run: RunDir, monitor: EngineMonitor, first_step: int, num_steps: int
    ) -> None:
        self._interval = config.logging.log_interval
        self._monitor, self._num_steps = monitor, num_steps
        self._metrics = MetricsWriter(config, run, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._metrics.close(failed=kind is not None)

    def report(self, step: int, values: dict[str, float]) -> None:
        """Writes a step's numbers, and every ``log_interval`` steps what engines and people say.

        Args:
            step: Optimizer steps done, counted from 1.
            values: Numbers by tag, see :data:`~torchspec_hpc.training.meter.TAGS`.
        """
        is_told = step % self._interval == 0
        if is_told:
            values = values | self._monitor.read()
        self._metrics.write(step, values)
        if is_told:
            logger.info("step %d/%d  %s", step, self._num_steps, line(values))


def line(values: dict[str, float]) -> str:
    """The numbers that a person wants to see go by."""
    parts = [
        f"loss {values['train/loss']:.4f}",
        f"accept_len {values['train/accept_len']:.3f}",
        f"lr {values['train/lr']:.2e}",
        f"grad_norm {values['train/grad_norm']:.3f}",
        f"{values['throughput/tokens_per_s']:.0f} tokens/s",
        f"waiting {values['throughput/wait_share']:.0%}",
        f"memory {values['memory/peak_bytes'] / 2**30:.1f} GiB",
    ]
    if "throughput/mfu" in values:
        parts.append(f"mfu {values['throughput/mfu']:.1%}")
    if values["train/skipped_steps"]:
        parts.append(f"skipped {values['train/skipped_steps']:.0f}")
    return "  ".join(parts)
