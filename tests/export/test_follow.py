"""Which checkpoints of a run are served; the engine itself is in test_served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.export.conftest import RunWriter, make_checkpoint
from torchspec_hpc.config import RunDir
from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.export.evaluate import ServeSettings
from torchspec_hpc.export.follow import FollowSettings, follow

SETTINGS = FollowSettings(ServeSettings("target"), [], poll_s=0.01)


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run"):
        follow(RunDir(tmp_path), SETTINGS)


@pytest.fixture
def run(write_run: RunWriter) -> RunDir:
    made = RunDir(write_run(make_checkpoint("nowhere")))
    made.config.touch()
    made.control.mkdir()
    made.done.touch()
    return made


def test_what_was_measured_is_not_measured_again(run: RunDir) -> None:
    (run.root / "served.jsonl").write_text(json.dumps({"step": 7}) + "\n")
    follow(run, SETTINGS)


def test_a_record_that_is_damaged(run: RunDir) -> None:
    (run.root / "served.jsonl").write_text("{\n")
    with pytest.raises(TorchspecError, match="remove it"):
        follow(run, SETTINGS)


def test_a_checkpoint_that_cannot_be_read_is_passed_over(
    run: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    for shard in run.checkpoints.glob("step_7/*.distcp"):
        shard.unlink()
    follow(run, SETTINGS)
    assert "step 7 is not measured" in caplog.text
