"""Jobs of engines that join a run: what is submitted, and what is refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.slurm.configs import small_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.load import load_config, save_config
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.submit_join import render_join, submit_join


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in the queue."""
    run = RunDir(tmp_path / "small")
    run.create()
    save_config(small_config(tmp_path), run.config)
    RunRecord(run.run_id, "slurm", "7").write(run)
    return run


def test_the_job_has_the_engines_alone(run: RunDir) -> None:
    overrides = ["slurm.inference.partition=spare", "inference.inference_num_gpus=3"]
    script = render_join(load_config(run.config, overrides), run, overrides)
    lines = script.splitlines()
    assert "#SBATCH --partition=spare" in lines
    assert "#SBATCH --nodes=3" in lines
    assert "#SBATCH --requeue" in lines
    assert f"#SBATCH --comment={run.run_id}-join" in lines, "it is not the run's own job"
    assert "hetjob" not in script
    module = f"-m torchspec_hpc.slurm.join --run-dir {run.root} "
    assert script.rstrip().endswith(module + " ".join(overrides))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_what_cannot_be_joined_is_refused(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no run in .*nowhere"):
        submit_join(RunDir(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"2 engines on a node, the run itself has 1\n.*allowed: 1"):
        submit_join(
            run, ["inference.inference_num_gpus=2", "inference.inference_num_gpus_per_node=2"]
        )
    with pytest.raises(UserError, match=r"inference.inference_batch_size is 3 here and 8 in the"):
        submit_join(run, ["inference.inference_batch_size=3"])
    run.done.touch()
    with pytest.raises(UserError, match="is complete"):
        submit_join(run)
    RunRecord(run.run_id, "local").write(run)
    with pytest.raises(UserError, match="cluster: local"):
        submit_join(run)


def test_nodes_that_have_joined_have_an_address(run: RunDir) -> None:
    Endpoints("id", 0, "a:1", "a:2", {"own": "10.0.0.1"}).write(run)
    write_atomic(run.joined / "1.json", {"job_id": "9", "addresses": {"other": "10.0.0.2"}})
    assert Endpoints.read(run, 1).addresses == {"own": "10.0.0.1", "other": "10.0.0.2"}
    assert list(json.loads(run.endpoints.read_text())["addresses"]) == ["own"]
