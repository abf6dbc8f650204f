"""Reading what Slurm's clients print."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from torchspec_hpc.slurm.env import parse_addresses
from torchspec_hpc.slurm.job_info import GONE, JobInfo, parse_sacct, parse_squeue
from torchspec_hpc.slurm.scheduler import job_infos

#: As sacct printed it on a cluster with slurmdbd: het jobs are J+0, J+1.
SACCT = """\
12+0|RUNNING|0:0|infer0
12+1|RUNNING|0:0|train[0-1]
14+0|CANCELLED by 1000|0:15|infer0
14+1|CANCELLED by 1000|0:15|train0
16|FAILED|85:0|n7
18|PENDING|0:0|None assigned
"""


def test_reads_sacct() -> None:
    infos = parse_sacct(SACCT)
    assert infos["12"] == JobInfo("12", "RUNNING", nodes="infer0")
    assert infos["14"] == JobInfo("14", "CANCELLED", exit_code=-15, nodes="infer0")
    assert infos["16"].exit_code == 85
    assert not infos["18"].ended
    assert sorted(infos) == ["12", "14", "16", "18"]


RECORDED = Path(__file__).parent / "recorded"
VERSIONS = sorted(path.stem.removeprefix("squeue_") for path in RECORDED.glob("squeue_*.txt"))


@pytest.mark.parametrize("version", VERSIONS)
def test_reads_squeue(version: str) -> None:
    """As ``squeue -O`` printed it on a real cluster, all jobs."""
    text = (RECORDED / f"squeue_{version}.txt").read_text()
    infos = parse_squeue(text, ["1", "3", "4", "5", "6", "7", "99"], whole_queue=True)
    assert {job_id: info.state for job_id, info in infos.items()} == {
        "1": "PENDING", "3": "PENDING", "4": "CANCELLED", "5": "FAILED", "6": "RUNNING",
        "7": "COMPLETED",
    }  # fmt: skip
    assert (infos["5"].exit_code, infos["7"].exit_code, infos["6"].exit_code) == (85, 0, None)
    # the het job is held, its other component waits in another partition
    assert (infos["3"].position, infos["1"].position, infos["6"].position) == (1, 2, None)
    assert (infos["1"].reason, infos["1"].start) == ("JobHeldUser", "")
    assert infos["6"].time_left.startswith("9:5")
    assert infos["4"].nodes == "infer0"


@pytest.mark.parametrize("version", VERSIONS)
def test_reads_node_addresses(version: str) -> None:
    text = (RECORDED / f"scontrol_node_{version}.txt").read_text()
    assert parse_addresses(text) == {"infer0": "127.0.1.1", "train1": "127.0.1.4"}


@pytest.mark.slurm
def test_asks_for_several_jobs_at_once(login_node: Cluster) -> None:
    fails = login_node.sbatch("--output=/dev/null", "--wrap=exit 85")
    waits = login_node.sbatch("--output=/dev/null", "--hold", "--wrap=true")
    login_node.wait_state(fails)
    infos = job_infos([fails, waits, "99999"])
    assert (infos[fails].state, infos[fails].exit_code) == ("FAILED", 85)
    assert infos[fails].nodes == "infer0"
    assert infos[waits].state == "PENDING"
    assert infos[waits].reason == "JobHeldUser"
    assert infos[waits].exit_code is None
    assert infos[waits].restarts == 0
    assert infos["99999"] == JobInfo("99999", GONE)
    assert infos["99999"].ended
    assert job_infos(["99999"])["99999"].state == GONE
    login_node.cancel(waits)
