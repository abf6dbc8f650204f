from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import DeadlineExceeded, UserError
from torchspec_hpc.observe.logs import report_error, setup_logging


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunDir]:
    """A run on node n3, with the process's logging put back afterwards."""
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    root = logging.getLogger()
    before = root.level, list(root.handlers), logging.getLogger("torchspec_hpc").level
    yield RunDir(tmp_path / "run")
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(before[1]):
        root.removeHandler(handler)
        handler.close()
    for handler in before[1]:
        root.addHandler(handler)
    root.setLevel(before[0])
    logging.getLogger("torchspec_hpc").setLevel(before[2])
    logging.getLogger("__main__").setLevel(logging.NOTSET)


def test_a_rank_has_its_own_file_and_latest_points_to_its_attempt(run: RunDir):
    path = setup_logging("training", 5, run, attempt=0)
    assert path.parent == run.logs / "attempt_0" / "training" / "n3"
    assert path.name.startswith("training_rank5_")
    logging.getLogger("torchspec_hpc.x").info("caf\u00e9")
    line = path.read_text()
    assert "INFO" in line
    assert "n3 training/5 torchspec_hpc.x: caf\\xe9" in line
    setup_logging("training", 5, run, attempt=1)
    setup_logging("training", 6, run, attempt=1)
    assert (run.logs / "latest").resolve() == run.logs / "attempt_1"
    assert sorted(p.name for p in run.logs.iterdir()) == ["attempt_0", "attempt_1", "latest"]


def test_another_role_has_one_file(run: RunDir):
    assert setup_logging("supervisor", 0, run, 2) == run.logs / "attempt_2" / "supervisor.log"


def test_logs_move_with_their_variable(run: RunDir, monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TORCHSPEC_LOG_DIR", str(tmp_path / "elsewhere"))
    assert tmp_path / "elsewhere" / "run" in setup_logging("inference", 0, run, 0).parents


def test_level(run: RunDir, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHSPEC_LOG_LEVEL", "debug")
    path = setup_logging("training", 0, run, 0)
    logging.getLogger("torchspec_hpc.x").debug("ours")
    logging.getLogger("__main__").debug("of python -m")
    logging.getLogger("somebody.else").info("theirs")
    assert "ours" in path.read_text()
    assert "of python -m" in path.read_text()
    assert "theirs" not in path.read_text()
    monkeypatch.setenv("TORCHSPEC_LOG_LEVEL", "loud")
    with pytest.raises(UserError, match=r"TORCHSPEC_LOG_LEVEL is 'loud'(.|\n)*DEBUG, INFO"):
        setup_logging("training", 0, run, 0)


def test_unwritable_log_directory_is_a_user_error(run: RunDir):
    run.root.mkdir()
    run.logs.write_text("a file is in the way")
    with pytest.raises(UserError, match=r"cannot write the log file(.|\n)*TORCHSPEC_LOG_DIR"):
        setup_logging("training", 0, run, 0)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            UserError("no such model /x", hint="check it"),
            2,
            "no such model /x\n  next:    check it",
        ),
        (DeadlineExceeded("the engine", 3.0), 1, "waited 3 s for the engine, in vain"),
        (KeyError("a"), 1, "KeyError: 'a'"),
    ],
)
def test_an_error_is_left_in_control_and_in_the_log(run: RunDir, error, code, message):
    path = setup_logging("training", 1, run, 0)
    with pytest.raises(type(error)) as raised:
        raise error
    assert report_error(run, "training", 1, raised.value) == code
    content = json.loads((run.errors / "training_1.json").read_text())
    assert content == {
        "role": "training", "rank": 1, "node": "n3", "error": message, "exit_code": code,
    }  # fmt: skip
    log = path.read_text()
    assert message in log
    assert ("Traceback" in log) == isinstance(error, KeyError)


def test_an_unwritable_control_directory_does_not_hide_the_error(run: RunDir):
    run.root.mkdir()
    path = setup_logging("training", 1, run, 0)
    run.control.write_text("a file is in the way")
    assert report_error(run, "training", 1, UserError("the cause")) == 2
    assert "the cause" in path.read_text()
    assert "cannot write" in path.read_text()


def test_observe_does_not_import_torch():
    modules = "torchspec_hpc.observe.logs, torchspec_hpc.observe.metrics"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
