"""``torchspec-hpc export``."""

from __future__ import annotations

from pathlib import Path

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.types import Dtype
from torchspec_hpc.export import checkpoint as checkpoints
from torchspec_hpc.export.eagle3 import export_draft


def export_command(source: Path, output: Path | None, dtype: Dtype, *, untrained: bool) -> Path:
    """Exports the latest checkpoint of a run, or the one given.

    Args:
        source: Run, ``checkpoints`` directory, one checkpoint, or ``checkpoints/best``.
        output: Where to; default ``<run>/export/step_<n>``.
        dtype: Of the written weights.
        untrained: Export the initial weights instead, for comparison.
    """
    checkpoint = checkpoints.read_checkpoint(source)
    run = RunDir(checkpoint.path.parent.parent)
    if untrained:
        config = load_config(run.config)
        checkpoint = checkpoints.untrained(checkpoint, config.model, config.training.seed)
    folder = output or run.export / f"step_{checkpoint.meta.step}"
    return export_draft(checkpoint, folder, dtype)
