"""The run directory."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError


def test_logs_can_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "my-run")
    assert run.logs == tmp_path / "my-run" / "logs"
    monkeypatch.setenv("TORCHSPEC_LOG_DIR", str(tmp_path / "elsewhere"))
    assert run.logs == tmp_path / "elsewhere" / "my-run"
    monkeypatch.setenv("TORCHSPEC_LOG_DIR", "relative")
    with pytest.raises(UserError, match="absolute path"):
        _ = run.logs


def test_one_path_has_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir("x/../runs/./one").run_id == RunDir(tmp_path / "runs" / "one").run_id


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run directory"):
        RunDir(tmp_path / "file" / "run").create()


def test_write_atomic_replaces_and_keeps_mode(tmp_path: Path) -> None:
    target = tmp_path / "secret"
    write_atomic(target, "one", mode=0o600)
    write_atomic(target, {"two": 2}, mode=0o600)
    assert target.read_text() == '{\n  "two": 2\n}\n'
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]
