"""Het jobs through submitit on the real cluster, with small commands instead of a supervisor."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from submitit.core.utils import CommandFunction, FailedJobError

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.configs import small_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.slurm.executor import HetSlurmExecutor, HetSlurmJob
from torchspec_hpc.slurm.snapshot import snapshot_code

pytestmark = pytest.mark.slurm

DESCRIBE = """
echo "batch $SLURMD_NODENAME $SLURM_JOB_NODELIST_HET_GROUP_0 $SLURM_JOB_NODELIST_HET_GROUP_1"
echo "memory ${SLURM_MEM_PER_NODE-unset}"
srun --het-group=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=3 --gres=gpu:1 \
    sh -c 'echo "task $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"' | sort
"""


def _submit(folder: Path, script: str) -> HetSlurmJob:
    run = RunDir(folder / "small")
    run.create()
    snapshot_code(run)
    job = HetSlurmExecutor(small_config(folder), run).submit(
        CommandFunction(["bash", "-euc", script])
    )
    assert isinstance(job, HetSlurmJob)
    return job


def test_runs_a_command_on_both_components(
    login_node: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "7")  # as left behind by an enclosing job
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    with caplog.at_level(logging.WARNING):
        job = _submit(tmp_path / "it has spaces, 100%", DESCRIBE)
    assert "SBATCH_PARTITION have no effect" in caplog.text
    assert job.result() == 0
    assert (job.stdout() or "").splitlines() == [
        "batch infer0 infer0 train[0-1]",
        "memory unset",
        "task 0 train0 0",
        "task 1 train1 0",
    ]
    assert job.state == "COMPLETED"
    assert job.done()
    components = login_node.run("scontrol", "show", "job", "-o", job.job_id).splitlines()
    for line, expected in zip(
        components,
        [
            "Partition=infer NumNodes=1 NumCPUs=2 CPUs/Task=2 MinMemoryNode=200M",
            "Partition=train NumNodes=2 NumCPUs=6 CPUs/Task=3 MinMemoryNode=300M",
        ],
        strict=True,
    ):
        words = f"{expected} JobName=small Requeue=1 TimeLimit=00:10:00 Comment=small-"
        assert [word for word in words.split() if word not in line] == []


def test_shows_what_failed(login_node: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "echo starting; echo 'no such model' >&2; exit 3")
    with pytest.raises(FailedJobError, match=r"(?s)FAILED, exit code 3.*no such model.*slurm-"):
        job.result()
    assert job.paths.submission_file.read_text().startswith("#!/bin/bash")


def test_warning_reaches_the_command(login_node: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "trap 'exit 85' USR1; echo ready; while :; do sleep 0.1; done")
    _wait_for_line(job, "ready")
    job._interrupt(timeout=True)
    with pytest.raises(FailedJobError, match="exit code 85"):
        job.result()


def test_requeue_is_not_the_end(login_node: Cluster, tmp_path: Path) -> None:
    job = _submit(
        tmp_path,
        'echo "attempt ${SLURM_RESTART_COUNT-first}"\n'
        '[ -n "${SLURM_RESTART_COUNT-}" ] || { scontrol requeue "$SLURM_JOB_ID"; sleep 60; }',
    )
    login_node.wait_restart(job.job_id, 1)
    assert job.result() == 0
    lines = (job.stdout() or "").splitlines()
    assert [line for line in lines if line.startswith("attempt")] == ["attempt first", "attempt 1"]


def test_cancel(login_node: Cluster, tmp_path: Path) -> None:
    job = _submit(tmp_path, "echo ready; sleep 60")
    _wait_for_line(job, "ready")
    assert not job.done(force_check=True)
    job.cancel()
    login_node.wait_state(job.job_id)
    assert job.done(force_check=True)
    assert job.state == "CANCELLED"


@pytest.mark.skipif(shutil.which("srun") is None, reason="submitit wants srun on the machine")
def test_takes_one_command(tmp_path: Path) -> None:
    executor = HetSlurmExecutor(small_config(tmp_path), RunDir(tmp_path / "small"))
    with pytest.raises(ValueError, match="no arrays of heterogeneous jobs"):
        executor.map_array(CommandFunction(["true"]), [1, 2])
    with pytest.raises(TypeError, match="CommandFunction without arguments, not <built-in"):
        executor.submit(print)
    with pytest.raises(TypeError, match="without arguments"):
        executor.submit(CommandFunction(["echo"]), "dropped")


def _wait_for_line(job: HetSlurmJob, line: str) -> None:
    wait_for(lambda: line in (job.stdout() or ""), f"{line!r} in {job.paths.stdout}")
