"""Who may write to a run directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.slurm.lock import Holder, RunLocked, run_lock


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def left_by(run: RunDir, **changes: object) -> None:
    """The lock of somebody else."""
    write_atomic(run.lock, asdict(replace(Holder.this_process(None), **changes)))


def test_one_holder_at_a_time(run: RunDir) -> None:
    with run_lock(run, None):
        assert json.loads(run.lock.read_text())["pid"] == os.getpid()
        with pytest.raises(RunLocked, match=r"written to by a local run on .*\n.*rm .*lock"):
            run_lock(run, None).__enter__()
    assert not run.lock.exists()
    assert list(run.control.glob(".lock*")) == []


def test_a_requeued_job_takes_its_own_lock_over(run: RunDir) -> None:
    left_by(run, job_id="7", host="another node", pid=1)
    with run_lock(run, "7"):
        assert Holder.read(run).host == socket.gethostname()
    assert not run.lock.exists()


def test_a_dead_process_holds_nothing(run: RunDir) -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    left_by(run, pid=child.pid)
    with run_lock(run, None):
        pass


def test_another_machine_cannot_be_looked_at(run: RunDir) -> None:
    left_by(run, host="elsewhere")
    with pytest.raises(RunLocked, match=r"elsewhere, process .*, which cannot be looked at"):
        run_lock(run, None).__enter__()


def test_without_slurm_nobody_knows(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(run, job_id="7")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RunLocked, match=r"Slurm does not say .* no squeue"):
        run_lock(run, "8").__enter__()


@pytest.mark.slurm
def test_slurm_knows_whether_a_job_has_ended(login_node: Cluster, run: RunDir) -> None:
    waits = login_node.sbatch("--output=/dev/null", "--hold", "--wrap=true")
    left_by(run, job_id=waits)
    with pytest.raises(RunLocked, match=f"job {waits} on "):
        run_lock(run, "8").__enter__()
    login_node.cancel(waits)
    login_node.wait_state(waits)
    with run_lock(run, "8"):
        assert Holder.read(run).job_id == "8"
