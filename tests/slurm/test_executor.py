"""Het jobs through submitit on the real cluster, with small commands instead of a supervisor."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
from pathlib import Path

import pytest
from submitit.core.job_environment import JobEnvironment
from submitit.core.utils import CommandFunction, FailedJobError

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.configs import small_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.slurm.executor import PRIVATE_API, RunExecutor, RunJob
from torchspec_hpc.slurm.snapshot import snapshot_code

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]

DESCRIBE = """
echo "batch $SLURMD_NODENAME $SLURM_JOB_NODELIST_HET_GROUP_0 $SLURM_JOB_NODELIST_HET_GROUP_1"
echo "memory ${SLURM_MEM_PER_NODE-unset}"
srun --het-group=1 --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=3 --gres=gpu:1 \
    sh -c 'echo "task $SLURM_PROCID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"' | sort
"""


def _submit(folder: Path, script: str) -> RunJob:
    run = RunDir(folder / "small")
    run.create()
    snapshot_code(run)
    job = RunExecutor(small_config(folder), run).submit(CommandFunction(["bash", "-euc", script]))
    assert isinstance(job, RunJob)
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


def _describe(word: str) -> dict[str, object]:
    print(f"called with {word}")
    return {"word": word, "node": os.environ["SLURMD_NODENAME"], "signal": JobEnvironment.USR_SIG}


def test_a_function_returns_its_value(
    login_node: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # where the job finds the function
    executor = RunExecutor(small_config(tmp_path), RunDir(tmp_path / "small"))
    job = executor.submit(_describe, "a b")
    assert job.result() == {"word": "a b", "node": "infer0", "signal": "USR1"}
    assert "called with a b" in job.stdout()
    assert job.state == "COMPLETED"
    again = RunJob(job.paths.folder, f"{job.job_id}+0")
    assert again.result()["word"] == "a b"


def test_no_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/srun")  # submitit looks for it
    executor = RunExecutor(small_config(tmp_path), RunDir(tmp_path / "small"))
    with pytest.raises(ValueError, match="no arrays of heterogeneous jobs"):
        executor.map_array(CommandFunction(["true"]), [1, 2])


#: As submitit 1.5.4 has them: if this test fails, read what has changed, then adapt executor.py.
SIGNATURES = {
    "SlurmInfoWatcher": {
        "update": "(self) -> None",
        "is_done": "(self, job_id: str, mode: str = 'standard') -> bool",
        "get_state": "(self, job_id: str, mode: str = 'standard') -> str",
        "get_info": "(self, job_id: str, mode: str = 'standard') -> Dict[str, str]",
    },
    "SlurmJob": {
        "_get_outcome_and_result": "(self) -> Tuple[str, Any]",
        "_interrupt": "(self, timeout: bool = False) -> None",
    },
    "SlurmExecutor": {
        "_internal_process_submissions": (
            "(self, delayed_submissions: List[submitit.core.utils.DelayedSubmission])"
            " -> List[submitit.core.core.Job[Any]]"
        ),
        "_make_submission_file_text": "(self, command: str, uid: str) -> str",
        "_make_submission_command": "(self, submission_file_path: pathlib.Path) -> List[str]",
        "_num_tasks": "(self) -> int",
        "_submit_command": "(self, command: str) -> submitit.core.core.Job[typing.Any]",
        "_submitit_command_str": "property",
    },
}


def test_submitit_is_as_we_know_it() -> None:
    found = {
        owner.__name__: {name: _signature(owner, name) for name in names}
        for owner, names in PRIVATE_API.items()
    }
    assert found == SIGNATURES


def _signature(owner: type, name: str) -> str:
    member = inspect.getattr_static(owner, name)
    return "property" if isinstance(member, property) else str(inspect.signature(member))


def _wait_for_line(job: RunJob, line: str) -> None:
    wait_for(lambda: line in (job.stdout() or ""), f"{line!r} in {job.paths.stdout}")
