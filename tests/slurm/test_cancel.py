"""Waiting for the end of a run while Slurm does not answer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.slurm.configs import small_config
from torchspec_hpc.cli import run_commands
from torchspec_hpc.slurm import cancel
from torchspec_hpc.slurm.prepare import prepare_run
from torchspec_hpc.slurm.record import RunRecord


@pytest.fixture
def _no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")


@pytest.mark.usefixtures("_no_answer")
def test_no_answer_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_run(small_config(tmp_path))
    RunRecord(run.run_id, "slurm", job_id="12").write(run)
    monkeypatch.setattr(cancel, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(cancel, "_POLL_S", 0.1)
    assert not cancel._ends_in_time(run, ["12"], seconds=0.3)
    monkeypatch.setattr(run_commands, "_FIRST_ASK_S", 0.0)
    assert not run_commands._EndWatch(run).has_ended()
