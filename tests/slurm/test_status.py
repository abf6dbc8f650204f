"""How a run has ended, from its files and Slurm's word; see also ``tests/cli``."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchspec_hpc.config import RunDir
from torchspec_hpc.errors import EXIT_REQUEUE
from torchspec_hpc.slurm.job_info import JobInfo
from torchspec_hpc.slurm.requeue import Ending, record_ending
from torchspec_hpc.slurm.status import _ended


@pytest.mark.parametrize(
    ("slurm", "exit_code", "state"),
    [
        ("FAILED", EXIT_REQUEUE, "stopped"),
        ("FAILED", 127, "failed"),  # requeued, and the script failed before the supervisor began
        ("NODE_FAIL", 0, "failed"),
        ("CANCELLED", -15, "stopped"),
        ("TIMEOUT", 0, "stopped"),
        ("GONE", None, "stopped"),
    ],
)
def test_an_ending_that_is_not_the_last(
    tmp_path: Path, slurm: str, exit_code: int | None, state: str
) -> None:
    run = RunDir(tmp_path)
    run.create()
    record_ending(run, Ending(EXIT_REQUEUE, "the time limit"), {})
    expected = "the time limit" if state == "stopped" else f"job 12: {slurm}"
    assert _ended(run, JobInfo("12", slurm, exit_code)) == (state, expected)
