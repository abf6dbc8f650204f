"""One submit, one heterogeneous job, on a real cluster; and what may happen to it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import ConfigWriter, losses, torchspec_hpc
from tests.slurm.cluster import ENDED, Cluster

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

STEPS = 100
LONG_STEPS = 1500


def submit(cluster: Cluster, config: Path) -> tuple[str, Path]:
    """Submits through the command line; returns the job and the run directory."""
    done = torchspec_hpc("submit", config, env=cluster.env)
    assert done.returncode == 0, done.stderr
    run = Path(done.stdout.split("run directory:")[1].strip())
    return json.loads((run / "run.json").read_text())["job_id"], run


def wait_step(run: Path, step: int, timeout_s: float = 120) -> None:
    """Waits until a training step is logged."""
    deadline = time.monotonic() + timeout_s
    while not (run / "metrics.jsonl").is_file() or max(losses(run), default=0) < step:
        assert time.monotonic() < deadline, f"no step {step} in {run}"
        time.sleep(0.05)


def finish(cluster: Cluster, job: str, run: Path, timeout_s: float = 240) -> None:
    """Waits for the end of a job that must succeed and leave nothing behind."""
    info = cluster.wait_state(job, ENDED, timeout_s)
    log = "\n".join(p.read_text() for p in sorted(run.glob("logs/attempt_*/supervisor.log")))
    assert info["JobState"] == "COMPLETED", log
    assert (run / "control" / "done").is_file()
    deadline = time.monotonic() + 10
    while left := cluster.job_processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[int, dict[int, float]]:
    """Loss curves of undisturbed runs by number of trainers, filled by the first test."""
    return {}


@pytest.mark.parametrize("num_trainers", [1, 2])
@pytest.mark.parametrize("how", ["nothing", "warning", "requeue"])
def test_interrupted_run_has_the_loss_curve_of_an_undisturbed_one(
    cluster: Cluster,
    config_file: ConfigWriter,
    uninterrupted: dict[int, dict[int, float]],
    num_trainers: int,
    how: str,
) -> None:
    """Bit for bit: float32 on the CPU, engine rows that do not depend on their batch."""
    training = {"training_num_nodes": num_trainers, "num_train_steps": STEPS}
    job, run = submit(cluster, config_file(cluster="slurm", training=training))
    if how != "nothing":
        wait_step(run, 5)
        if how == "warning":
            cluster.warn(job)
        else:
            cluster.run("scontrol", "requeue", job)
        cluster.wait_restart(job, 1, 120)
    finish(cluster, job, run)
    curve = losses(run)
    assert list(curve) == list(range(1, STEPS + 1))
    if how == "nothing":
        uninterrupted[num_trainers] = curve
    else:
        assert (run / "logs" / "attempt_1").is_dir()
        assert curve == uninterrupted[num_trainers]


def test_time_limit_requeues_and_loses_no_step(cluster: Cluster, config_file: ConfigWriter) -> None:
    """The real limit of one minute, with its real warning; an undisturbed run beside it."""
    training = {"num_train_steps": LONG_STEPS, "ttt_length": 7}
    short = {"time": "00:01:00", "signal_before_s": 20}
    limited = config_file(cluster="slurm", run_name="limited", training=training, slurm=short)
    free = config_file(cluster="slurm", run_name="free", training=training)
    (job, run), (other, reference) = submit(cluster, limited), submit(cluster, free)
    cluster.wait_restart(job, 1, 180)
    finish(cluster, other, reference)
    finish(cluster, job, run, 300)
    assert losses(run) == losses(reference)
