from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchspec_hpc.training.launch import node_exit_code


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([85, -15], 85),
        ([-15, 85], 85),
        ([1, 2], 2),
        ([1, -15], 1),
        ([3], 3),
        ([-9, -15], 137),
        ([], 1),
    ],
)
def test_the_telling_exit_code_wins(codes, expected):
    assert node_exit_code(codes) == expected


def start(script: Path, *arguments: str) -> subprocess.Popen[bytes]:
    launch = [sys.executable, "-m", "torchspec_hpc.training.launch", "--standalone"]
    return subprocess.Popen([*launch, "--nproc-per-node", "2", str(script), *arguments])


def test_exit_code_of_the_trainers(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time; time.sleep(int(os.environ['RANK'])); sys.exit(85)")
    assert start(script).wait(60) == 85


def test_a_warning_signal_is_ignored_and_sigterm_obeyed(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time, pathlib\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    process = start(script, str(tmp_path))
    deadline = time.monotonic() + 60
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(40) == 128 + signal.SIGTERM
