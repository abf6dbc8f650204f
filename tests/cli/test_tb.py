"""TensorBoard, for real: on the loopback interface, and in a job."""

from __future__ import annotations

import getpass
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.helpers import free_port
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.configs import small_config
from torchspec_hpc.config import RunDir
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.prepare import prepare_run
from torchspec_hpc.slurm.tensorboard import Tensorboard

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    groups = {
        "inference": {"partition": "infer", "mem": "200M", "gpus": "none"},
        "training": {"partition": "train", "mem": "300M", "gpus": "none"},
    }
    return prepare_run(small_config(tmp_path, **groups))


def test_serves_on_the_loopback_interface(run: RunDir) -> None:
    port = free_port()
    command = [sys.executable, "-m", "torchspec_hpc.cli.main", "tb", run.root, "--json"]
    with subprocess.Popen(
        [*command, "--port", str(port)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            said = json.loads("".join(process.stdout.readline() for _ in range(5)))
            assert re.fullmatch(
                rf"ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@\S+", said["tunnel"]
            )
            wait_for(lambda: _answers(said["url"]), "TensorBoard", 120)
            limits = Path(f"/proc/{process.pid}/limits").read_text()
            assert re.search(rf"Max data size +{4 * 2**30} ", limits)
        finally:
            process.kill()


def test_a_port_that_is_taken(run: RunDir) -> None:
    board = Tensorboard.on_port([run], 0)
    assert "--logdir" in board.command
    assert "--logdir_spec" in Tensorboard.on_port([run, run], 0).command
    with subprocess.Popen([sys.executable, "-m", "http.server", str(board.port)]) as server:
        try:
            wait_for(lambda: _answers(board.url), "a server", 30)
            with pytest.raises(UserError, match="the port is in use"):
                Tensorboard.on_port([run], board.port)
        finally:
            server.kill()


@pytest.mark.slurm
def test_in_a_job(login_node: Cluster, run: RunDir, ask: Command) -> None:
    said = ask("tb", run.root, "--on-compute", "--time-limit", "10")
    log = Path(said["log"])
    wait_for(lambda: log.is_file() and "ssh -N -L" in log.read_text(), "the tunnel's command", 60)
    text = log.read_text()
    assert re.search(rf"-J {getpass.getuser()}@\S+ {getpass.getuser()}@\S+", text)
    url = re.search(r"http://localhost:\d+", text)[0]
    wait_for(lambda: _answers(url), "TensorBoard", 120)
    login_node.cancel(said["job_id"])
    login_node.wait_state(said["job_id"])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as page:
            return page.status == 200
    except OSError:
        time.sleep(0.2)
        return False
