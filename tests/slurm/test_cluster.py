"""The test cluster itself: what the other tests rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Layout, missing_programs, wait_for
from torchspec_hpc.slurm.shepherd import descendants

pytestmark = pytest.mark.slurm

HET_JOB = """#!/bin/bash
#SBATCH --partition=infer --nodes=1 --mem=100 --gres=gpu:2
#SBATCH --output={output}
#SBATCH hetjob
#SBATCH --partition=train --nodes=2 --ntasks-per-node=1 --mem=100 --gres=gpu:1
printenv SLURMD_NODENAME CUDA_VISIBLE_DEVICES
srun --het-group=1 --nodes=2 --ntasks=2 --label printenv SLURMD_NODENAME CUDA_VISIBLE_DEVICES | sort
"""


def test_het_job_with_gpus(cluster: Cluster, tmp_path: Path) -> None:
    script, output = tmp_path / "job.sh", tmp_path / "out"
    script.write_text(HET_JOB.format(output=output))
    info = cluster.wait_state(cluster.sbatch(script))
    assert info["JobState"] == "COMPLETED"
    assert output.read_text().split("\n")[:6] == [
        "infer0", "0,1", "0: 0", "0: train0", "1: 0", "1: train1",
    ]  # fmt: skip


def test_stops_without_a_trace(cluster: Cluster) -> None:
    del cluster  # only says that Slurm is installed
    before = set(descendants(os.getpid()))
    with Cluster(Layout(partitions={"p": 1})) as own:
        own.sbatch("--partition=p", "--output=/dev/null", "--wrap=setsid sleep 1234 & sleep 1234")
        wait_for(lambda: "sleep 1234" in own.job_processes(), "the job's process")
        root = own.root
    assert set(descendants(os.getpid())) <= before
    assert not root.exists()
    assert not [p for p in Path("/proc").glob("[0-9]*") if _command(p) == "sleep 1234"]


def test_ends_with_a_killed_test_run(cluster: Cluster) -> None:
    del cluster
    code = (
        "import os, signal\nfrom tests.slurm.cluster import Cluster, Layout\n"
        "with Cluster(Layout(partitions={'p': 1})) as c:\n"
        "    print(c.root, c._keeper.pid, flush=True)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60)
    root, keeper = run.stdout.split()
    wait_for(lambda: not Path("/proc", keeper).exists(), "the keeper's end")
    assert not Path(root).exists()
    assert not [p for p in Path("/proc").glob("[0-9]*") if root in _command(p)]


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces need root")
def test_isolated_network(cluster: Cluster, tmp_path: Path) -> None:
    del cluster
    with Cluster(Layout(partitions={"p": 2}, isolated_network=True)) as own:
        output = tmp_path / "out"
        own.sbatch(
            "--wait", "--nodes=2", f"--output={output}",
            "--wrap=srun --label sh -c 'hostname; hostname -I' | sort",
        )  # fmt: skip
        addresses = [own.addresses["p0"], own.addresses["p1"]]
    assert [line.split(": ")[1].strip() for line in output.read_text().splitlines()] == [
        addresses[0], "p0", addresses[1], "p1",
    ]  # fmt: skip


@pytest.mark.parametrize(("ci", "returncode"), [(None, 0), ("1", 1)])
def test_absence_is_loud(tmp_path: Path, ci: str | None, returncode: int) -> None:
    """Without Slurm: a summary that nobody overlooks; in CI a failure."""
    test = f"{Path(__file__).relative_to(Path.cwd())}::test_het_job_with_gpus"
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "pytest_timeout", test]
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "TORCHSPEC_REQUIRE_SLURM")}
    env |= {"PATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env |= {"CI": ci} if ci else {}
    done = subprocess.run(argv, env=env, text=True, capture_output=True, timeout=60)
    assert done.returncode == returncode
    assert "NOT RUN: no munged" in done.stdout
    assert ("SLURM TESTS NOT RUN" in done.stdout) == (ci is None)


def test_missing_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slurmctld" in missing_programs()


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""
