"""Served acceptance of a run while it trains: each new checkpoint, in an engine beside it.

The run knows nothing of it and waits for nothing: checkpoints are read as everybody may read them.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import latest_checkpoint, latest_step
from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.export.evaluate import Case, Measurement, Served, ServeSettings, measure
from torchspec_hpc.export.request import ExportRequest, run_export

logger = logging.getLogger(__name__)

RECORDS = "served.jsonl"


@dataclass(frozen=True)
class FollowSettings:
    """What is measured of each checkpoint.

    Attributes:
        serve: Of the engine.
        cases: What it is asked.
        num_speculative_tokens: k.
        every: Steps between measurements, at least; what comes in between is passed over.
        poll_s: Seconds between looks.
    """

    serve: ServeSettings
    cases: Sequence[Case]
    num_speculative_tokens: int = 3
    every: int = 1
    poll_s: float = 10.0


def follow(run: RunDir, settings: FollowSettings) -> None:
    """Measures new checkpoints until the run is done and its last one is measured.

    Started again it goes on with what has not been measured. A checkpoint that cannot be read, as
    one that the run has replaced meanwhile, is passed over.

    Args:
        run: It may not have begun yet.
        settings: What is measured.

    Raises:
        UserError: There is no such run, or prompts do not fit.
        TorchspecError: The engine failed.
    """
    if not run.config.is_file():
        raise UserError(f"{run.root} is no run", hint="give the directory that submit printed")
    measured = _last_measured(run)
    while True:
        is_done = run.done.exists()  # looked at first: its last checkpoint is there by then
        step = latest_step(run)
        if step > measured and (is_done or step >= measured + settings.every):
            measured = step
            _measure(run, step, settings)
        elif is_done:
            return
        else:
            time.sleep(settings.poll_s)


def _measure(run: RunDir, step: int, settings: FollowSettings) -> None:
    source = latest_checkpoint(run)
    assert source is not None
    with tempfile.TemporaryDirectory(prefix="torchspec-follow-") as scratch:
        draft = Path(scratch) / f"step_{step}"
        try:
            run_export(ExportRequest(source, draft, dtype="float32"))
        except UserError as error:
            logger.warning("step %d is not measured: %s", step, error)
            return
        served = Served(f"step {step}", draft, settings.num_speculative_tokens)
        found = measure(settings.serve, served, settings.cases, run.root / "served.log")
    _report(run, step, found)


def _report(run: RunDir, step: int, found: Sequence[Measurement]) -> None:
    """A line for each case in ``RUN/served.jsonl``, and curves beside those of the training."""
    from torch.utils.tensorboard import SummaryWriter

    with (run.root / RECORDS).open("a", encoding="utf-8") as file:
        for row in found:
            file.write(json.dumps({"step": step, **row.summary()}) + "\n")
    with SummaryWriter(str(run.tensorboard / "served")) as writer:
        for row in found:
            where = f"{row.prompts}, temperature {row.temperature:g}, {row.concurrency} in flight"
            writer.add_scalar(f"served_accept_len/{where}", row.accept_len, step)
            writer.add_scalar(f"served_tokens_per_s/{where}", row.tokens_per_s, step)
            for position, share in enumerate(row.accept_by_position, 1):
                writer.add_scalar(f"served_position_{position}/{where}", share, step)
            logger.info("step %d, %s: acceptance length %.3f", step, where, row.accept_len)


def _last_measured(run: RunDir) -> int:
    path = run.root / RECORDS
    if not path.is_file():
        return 0
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return max((int(json.loads(line)["step"]) for line in lines), default=0)
    except (ValueError, KeyError) as error:
        raise TorchspecError(f"cannot read {path}: {error!r}\n  next:    remove it") from error
