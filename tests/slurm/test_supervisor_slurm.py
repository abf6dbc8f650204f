"""The supervisor as the batch script of heterogeneous jobs on a real cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Layout
from tests.slurm.fake_workers.plan import Plan
from tests.slurm.supervised import GROUP, ROOT, SLURM, Run, make_run
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.render import render_script

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

TWO_NODES = {"training": {"training_num_nodes": 2}, "inference": {"inference_num_gpus": 2}}


@pytest.fixture(scope="module")
def patient(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster that leaves a job it ends the time for a checkpoint."""
    with Cluster(Layout(options={"KillWait": "20"})) as running:
        yield running


def submit(cluster: Cluster, run: Run) -> str:
    script = run.dir.script(0)
    script.parent.mkdir(exist_ok=True)
    script.write_text(render_script(run.config, run.dir, command=run.command))
    return cluster.sbatch(f"--export=ALL,PYTHONPATH={ROOT}", script)


def finish(cluster: Cluster, job: str, run: Run, state: str = "COMPLETED") -> None:
    """The job ends in this state, and nothing of it is left."""
    assert cluster.wait_state(job, timeout_s=60)["JobState"] == state, run.supervisor_logs()
    run.wait(lambda: not cluster.job_processes(), 10)


def test_a_job_runs_to_its_end(patient: Cluster, tmp_path: Path) -> None:
    plan = Plan(num_steps=5, leave_orphan=True, use_torch=True)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM, **TWO_NODES)
    finish(patient, submit(patient, run), run)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert run.outcome()["codes"]["training"] == 0
    addresses = json.loads(run.dir.endpoints.read_text())["addresses"]
    assert addresses == patient.addresses | {"infer0": "127.0.0.1"}  # of slurm.network_interface
    logs = run.dir.latest_logs
    for i in (0, 1):  # ranks follow the nodes
        assert list(logs.glob(f"training/train{i}/training_rank{i}_*.log"))
        assert list(logs.glob(f"inference/infer{i}/inference_rank{i}_*.log"))


def test_the_warning_requeues_and_no_step_is_lost(patient: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=40, step_s=0.1), cluster="slurm", slurm=SLURM)
    job = submit(patient, run)
    run.wait_step(3)
    patient.warn(job)
    patient.wait_restart(job, 1)
    finish(patient, job, run)
    assert run.steps() == list(range(1, 41))
    assert "requeue: from step" in run.supervisor_logs()
    assert {p.name for p in run.dir.logs.glob("attempt_*")} == {"attempt_0", "attempt_1"}


def test_a_requeue_from_outside_loses_no_step(patient: Cluster, tmp_path: Path) -> None:
    """Slurm sends SIGTERM to every process of the job, torchrun and services included."""
    plan = Plan(num_steps=40, step_s=0.1, use_torch=True)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM, **TWO_NODES)
    job = submit(patient, run)
    run.wait_step(3)
    patient.run("scontrol", "requeue", job)
    patient.wait_restart(job, 1)
    finish(patient, job, run)
    assert run.steps() == list(range(1, 41))
    assert "Slurm has put the job back into the queue" in run.supervisor_logs()


def test_a_cancelled_job_saves_and_stays_cancelled(patient: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=10_000), cluster="slurm", slurm=SLURM)
    job = submit(patient, run)
    run.wait_step(3)
    patient.cancel(job)
    finish(patient, job, run, "CANCELLED")
    assert patient.job(job)["Restarts"] == "0"
    assert run.outcome()["exit_code"] == 85
    assert run.outcome()["reason"] == "the job was cancelled"
    assert run.dir.latest_checkpoint.read_text().strip() == f"step_{run.steps()[-1]}"


def test_a_crash_is_tried_again_while_there_is_progress(patient: Cluster, tmp_path: Path) -> None:
    plan = Plan(crash_at=4, crash_code=7, save_every=1, num_steps=100)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM)
    job = submit(patient, run)
    patient.wait_restart(job, 1)
    finish(patient, job, run, "FAILED")
    assert patient.exit_code(job) == 7
    assert run.steps() == [1, 2, 3, 4, 4]
    assert run.outcome()["reason"] == "it crashed without progress since step 3"


def test_an_engine_that_dies_is_started_again(patient: Cluster, tmp_path: Path) -> None:
    plan = Plan(engine="die twice", num_steps=150, step_s=0.1)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM, **TWO_NODES)
    job = submit(patient, run)
    finish(patient, job, run)
    assert (run.dir.root / "starts").read_text().count("start") == 4
    assert "restart 1 of 5 in 1 s" in (run.dir.latest_logs / "inference_step.log").read_text()


def test_engines_that_cannot_start_end_the_job(patient: Cluster, tmp_path: Path) -> None:
    plan = Plan(engine="user error", num_steps=10_000)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM, **TWO_NODES)
    job = submit(patient, run)
    finish(patient, job, run, "FAILED")
    assert patient.exit_code(job) == 2
    assert "there is no model in /nowhere" in run.outcome()["message"]


def test_a_trainer_node_that_fails(patient: Cluster, tmp_path: Path) -> None:
    """Slurm requeues the whole job; see docs/slurm.md for the node of the batch script."""
    plan = Plan(num_steps=60, step_s=0.1, save_every=5)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=SLURM)
    job = submit(patient, run)
    run.wait_step(12)
    patient.run("scontrol", "update", "NodeName=train0", "State=DOWN", "Reason=test")
    # not hastened: changing a job's start after a node failure has crashed slurmctld 22.05
    run.wait((run.dir.logs / "attempt_1").is_dir)
    finish(patient, job, run)
    steps = run.steps()
    assert steps[-1] == 60
    assert len(steps) - 60 < plan.save_every  # repeated: those since the last checkpoint


@pytest.mark.parametrize("topology", ["single", "one_node"])
def test_one_allocation_for_both_groups(patient: Cluster, tmp_path: Path, topology: str) -> None:
    """On nodes, or on GPUs, of its own each; the warning requeues it like any other job."""
    group = {**GROUP, "partition": "infer"}
    slurm = {**SLURM, "topology": topology, "inference": group, "training": group}
    sizes = {
        "inference": {"inference_num_gpus": 2, "inference_num_gpus_per_node": 2},
        "training": {"training_num_gpus_per_node": 2},
    }
    plan = Plan(num_steps=40, step_s=0.1)
    run = make_run(tmp_path / "r", plan, cluster="slurm", slurm=slurm, **sizes)
    job = submit(patient, run)
    run.wait_step(3)
    patient.warn(job)
    patient.wait_restart(job, 1)
    finish(patient, job, run)
    assert run.steps() == list(range(1, 41))
    log = (run.dir.latest_logs / "training_step.log").read_text()
    trainer = "infer1" if topology == "single" else "infer0"
    assert list(run.dir.latest_logs.glob(f"training/{trainer}/*.log"))
    if topology == "one_node":
        # which step comes first is chance
        found = devices(run, "inference"), devices(run, "training")
        assert found in (({"0,1"}, {"2,3"}), ({"2,3"}, {"0,1"})), log


def test_a_job_without_engines(patient: Cluster, tmp_path: Path) -> None:
    """All hidden states are on disk: every node of the job is a trainer's."""
    group = {**GROUP, "partition": "infer"}
    slurm = {**SLURM, "topology": "single", "inference": group, "training": group}
    sizes = {
        "inference": {"inference_num_gpus": 0, "cache_dir": str(tmp_path / "states")},
        "training": {"training_num_nodes": 2},
    }
    run = make_run(tmp_path / "r", Plan(num_steps=5), cluster="slurm", slurm=slurm, **sizes)
    finish(patient, submit(patient, run), run)
    assert run.steps() == [1, 2, 3, 4, 5]
    assert not (run.dir.latest_logs / "inference_step.log").exists()
    nodes = {path.name for path in (run.dir.latest_logs / "training").iterdir()}
    assert nodes == {"infer0", "infer1"}


def test_a_chain_of_jobs_goes_on_where_requeueing_is_forbidden(
    patient: Cluster, tmp_path: Path
) -> None:
    slurm = {**SLURM, "resume": "chain"}
    run = make_run(tmp_path / "r", Plan(num_steps=40, step_s=0.1), cluster="slurm", slurm=slurm)
    job = submit(patient, run)
    run.wait_step(3)
    patient.warn(job)
    finish(patient, job, run, "FAILED")
    assert patient.exit_code(job) == 85
    follower = RunRecord.read(run.dir).job_id
    assert follower != job
    finish(patient, follower, run)
    assert run.steps() == list(range(1, 41))


def test_a_second_job_does_not_touch_the_run(patient: Cluster, tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=10_000), cluster="slurm", slurm=SLURM)
    job = submit(patient, run)
    run.wait_step(3)
    second = submit(patient, run)
    assert patient.wait_state(second)["JobState"] == "FAILED"
    assert patient.exit_code(second) == 2
    assert f"is written to by job {job} on " in run.dir.batch_log(second).read_text()
    assert not run.dir.exit_codes.exists()
    assert patient.state(job) == "RUNNING"
    patient.cancel(job)
    finish(patient, job, run, "CANCELLED")
    assert not run.dir.lock.exists()


def devices(run: Run, role: str) -> set[str]:
    """What the workers of a group found in ``CUDA_VISIBLE_DEVICES``."""
    logs = run.dir.latest_logs.glob(f"{role}/*/*.log")
    return set(re.findall(r"CUDA_VISIBLE_DEVICES=(\S*)", "".join(p.read_text() for p in logs)))
