"""One submit, one heterogeneous job, on a real cluster; and what may happen to it."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import (
    ConfigWriter,
    engines_of,
    losses,
    tiny_config,
    torchspec_hpc,
)
from tests.slurm.cluster import ENDED, Cluster, Layout, wait_for
from torchspec_hpc.config.yaml_io import dump_yaml

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 100
#: By number of trainers: longer than the time that a limit of one minute leaves.
LONG_STEPS = {1: 400, 2: 150}
#: Relative difference of losses that the engine's batching may cause.
NOISE = 1e-4


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
    while left := [line for line in cluster.job_processes() if str(run) in line]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


Undisturbed = Callable[[int], dict[int, float]]


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster,
    tiny_target: Path,
    tiny_conversations: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Undisturbed:
    """Loss curve of a run on so many trainer nodes that nothing disturbs; each runs once."""

    @functools.cache
    def curve(num_trainers: int) -> dict[int, float]:
        folder = tmp_path_factory.mktemp("undisturbed")
        config = tiny_config(folder / "runs", tiny_target, tiny_conversations)
        config["cluster"] = "slurm"
        config["training"] |= {"training_num_nodes": num_trainers, "num_train_steps": STEPS}
        (folder / "config.yaml").write_text(dump_yaml(config))
        job, run = submit(cluster, folder / "config.yaml")
        finish(cluster, job, run)
        assert list(losses(run)) == list(range(1, STEPS + 1))
        assert not (run / "logs" / "attempt_1").exists()
        return losses(run)

    return curve


@pytest.mark.parametrize(
    ("how", "num_trainers"),
    [
        ("warning", 1),
        ("requeue", 2),
        pytest.param("warning", 2, marks=pytest.mark.long),
        pytest.param("requeue", 1, marks=pytest.mark.long),
    ],
)
def test_interrupted_run_has_the_loss_curve_of_an_undisturbed_one(
    cluster: Cluster,
    config_file: ConfigWriter,
    undisturbed: Undisturbed,
    num_trainers: int,
    how: str,
) -> None:
    """Bit for bit: float32 on the CPU, engine rows that do not depend on their batch."""
    expected = undisturbed(num_trainers)
    training = {"training_num_nodes": num_trainers, "num_train_steps": STEPS}
    job, run = submit(cluster, config_file(cluster="slurm", training=training))
    wait_step(run, 5)
    if how == "warning":
        cluster.warn(job)
    else:
        cluster.run("scontrol", "requeue", job)
    cluster.wait_restart(job, 1, 120)
    finish(cluster, job, run)
    assert (run / "logs" / "attempt_1").is_dir()
    assert losses(run) == expected


@pytest.mark.long  # a real limit of one minute, several times
@pytest.mark.parametrize("num_trainers", [1, 2])
def test_time_limit_requeues_and_loses_no_step(
    cluster: Cluster, config_file: ConfigWriter, num_trainers: int
) -> None:
    """The real limit of one minute with its real warning, as often as it takes."""
    steps = LONG_STEPS[num_trainers]
    training = {"training_num_nodes": num_trainers, "num_train_steps": steps, "ttt_length": 7}
    short = {"time": "00:01:00", "signal_before_s": 10}
    sections = {"cluster": "slurm", "training": training}
    job, run = submit(cluster, config_file(run_name="limited", slurm=short, **sections))
    other, reference = submit(cluster, config_file(run_name="free", **sections))
    cluster.wait_restart(job, 1, 180)
    finish(cluster, job, run, 400)
    finish(cluster, other, reference)
    assert losses(run) == losses(reference)


def test_by_hand_without_submitit(
    cluster: Cluster,
    config_file: ConfigWriter,
    undisturbed: Undisturbed,
    tmp_path: Path,
) -> None:
    config = config_file(cluster="slurm", training={"num_train_steps": STEPS})
    task = "--ntasks-per-node=1 --cpus-per-task=1 --mem=2000M --gres=none"
    components = f"--partition=infer {task} : --partition=train {task}"
    job = cluster.sbatch(
        f"--export=ALL,TORCHSPEC_PYTHON={sys.executable}",
        f"--output={tmp_path}/%j.out",
        *components.split(),
        ROOT / "sbatch" / "train_het.sbatch",
        config,
        "run_name=by-hand",
        cwd=ROOT,
    )
    run = tmp_path / "runs" / "by-hand"
    finish(cluster, job, run)
    assert losses(run) == undisturbed(1)


def test_engines_of_another_job_join_and_carry_on_alone(
    cluster: Cluster, config_file: ConfigWriter, undisturbed: Undisturbed
) -> None:
    """The run's own engine hangs and is killed; the job that joined leaves when the run ends."""
    config = config_file(
        cluster="slurm",
        training={"num_train_steps": STEPS},
        control={"engine_restarts": 0, "heartbeat_s": 0.5},
    )
    job, run = submit(cluster, config)
    wait_step(run, 3)
    (own,) = engines_of(run, rank=None)
    os.kill(own, signal.SIGSTOP)  # nothing goes on until another engine is there
    done = torchspec_hpc("submit", "--join", run, "slurm.time=00:05:00", env=cluster.env)
    assert done.returncode == 0, done.stderr
    joined = done.stdout.split()[1]
    ready = run / "control" / "ready"
    wait_for(lambda: (ready / "inference_1000.json").is_file(), "the engine that joins", 120)
    os.kill(own, signal.SIGKILL)
    finish(cluster, job, run)
    assert cluster.wait_state(joined, ENDED, 60)["JobState"] == "COMPLETED"
    assert losses(run) == undisturbed(1)
    log = (run / "logs" / "latest" / "supervisor.log").read_text()
    assert "inference rank 0 has ended; engines left: 1" in log
    assert "inference rank 1000 is ready" in log
    assert not list((run / "control" / "joined").iterdir())


@pytest.mark.vllm
@pytest.mark.long
def test_vllm_engine_and_its_batching_noise(cluster: Cluster, config_file: ConfigWriter) -> None:
    """vLLM with free batching, disturbed and undisturbed: equal but for the engine's rounding."""
    engine = {"engine": "vllm", "batch_invariant": False}
    training = {"num_train_steps": STEPS}
    jobs = [
        submit(
            cluster, config_file(cluster="slurm", run_name=n, inference=engine, training=training)
        )
        for n in ("disturbed", "free")
    ]
    (job, run), (other, reference) = jobs
    wait_step(run, 5)
    cluster.warn(job)
    cluster.wait_restart(job, 1, 120)
    finish(cluster, other, reference)
    finish(cluster, job, run)
    assert list(losses(run)) == list(losses(reference))
    assert losses(run) == pytest.approx(losses(reference), rel=NOISE)


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root")
def test_nodes_with_networks_of_their_own(
    config_file: ConfigWriter, undisturbed: Undisturbed
) -> None:
    """Host names, addresses and ports as on a real cluster: nothing may mean 127.0.0.1."""
    with Cluster(Layout(isolated_network=True)) as isolated:
        config = config_file(
            cluster="slurm",
            training={"training_num_nodes": 2, "num_train_steps": STEPS},
            slurm={"network_interface": "eth0"},
        )
        job, run = submit(isolated, config)
        finish(isolated, job, run)
    assert losses(run) == undisturbed(2)
    logs = {path.parent.name for path in run.glob("logs/latest/*/*/*.log")}
    assert logs == {"infer0", "train0", "train1"}
