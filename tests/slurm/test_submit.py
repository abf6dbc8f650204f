"""Submission: the run directory, what is refused, and a real job in the queue."""

from __future__ import annotations

import json
import os
import pkgutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import torchspec_hpc.slurm
from tests.slurm.cluster import Cluster
from tests.slurm.configs import small_config, small_config_file
from torchspec_hpc.config.load import load_config
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.config.schema import Config
from torchspec_hpc.errors import ConfigError, UserError
from torchspec_hpc.slurm.lock import RunLocked, run_lock
from torchspec_hpc.slurm.prepare import (
    header_settings,
    prepare_run,
)
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.render import render_script
from torchspec_hpc.slurm.scheduler import count_nodes, find_jobs, job_info
from torchspec_hpc.slurm.submit import submit


def _held(folder: Path) -> Config:
    """A run whose job stays in the queue, so that no supervisor starts."""
    groups = {
        "inference": {"partition": "infer", "mem": "200M", "extra": ["--hold"]},
        "training": {"partition": "train", "mem": "300M", "gpu_type": None},
    }
    return small_config(folder, **groups)


@pytest.mark.slurm
def test_submit_resume_and_refusals(login_node: Cluster, tmp_path: Path) -> None:
    submitted = submit(_held(tmp_path))
    run, job_id = submitted.run, submitted.job_id
    assert run.root == tmp_path / "small"
    assert RunRecord.read(run) == RunRecord(run.run_id, "slurm", job_id)
    assert find_jobs(comment=run.run_id) == [job_id]
    assert job_info(job_id).state == "PENDING"
    assert submitted.earliest_start is not None
    assert run.script(0).read_text() == render_script(_held(tmp_path), run)

    with pytest.raises(UserError, match=r"small exists\n  next:.*--resume"):
        submit(_held(tmp_path))
    with pytest.raises(UserError, match=f"waits or runs as job {job_id}\n.*scancel {job_id}"):
        submit(_held(tmp_path), resume=True)

    submitted.job.cancel()
    login_node.wait_state(job_id)
    again = submit(_held(tmp_path), resume=True)
    assert again.job_id != job_id
    assert RunRecord.read(run) == RunRecord(run.run_id, "slurm", again.job_id)
    assert len(json.loads(run.provenance.read_text())["starts"]) == 2
    again.job.cancel()
    login_node.wait_state(again.job_id)

    run.done.touch()
    with pytest.raises(UserError, match="is complete"):
        submit(_held(tmp_path), resume=True)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"partition": "nowhere", "mem": "1G"}, "invalid partition specified: nowhere"),
        ({"partition": "train", "mem": "900G"}, "node configuration is not available"),
        (
            {"partition": "train", "mem": "1G", "extra": ["--nodes=9"]},
            "node configuration is not available",
        ),
        ({"partition": "train", "mem": "1G", "extra": ["--what=1"]}, "unrecognized option '--what"),
    ],
)
def test_refused_by_slurm(
    login_node: Cluster, tmp_path: Path, training: dict[str, object], message: str
) -> None:
    config = small_config(
        tmp_path, inference={"partition": "infer", "mem": "1G"}, training=training
    )
    with pytest.raises(UserError, match=f"(?s)Slurm refuses the job: .*{message}.*next: "):
        submit(config)
    assert not (tmp_path / "small").exists()


@pytest.mark.slurm
def test_components_that_cannot_be_disjoint(login_node: Cluster, tmp_path: Path) -> None:
    """Slurm accepts such a job and never starts it."""
    config = small_config(tmp_path, training={"partition": "infer", "mem": "300M"})
    with pytest.raises(ConfigError, match=r"needs 3 nodes, .*; infer has 2\n"):
        submit(config)
    assert count_nodes(["infer", "train"]) == 4
    assert count_nodes([None, "train,infer"]) == 4  # infer is the default
    assert count_nodes(["hidden"]) is None


@pytest.mark.slurm
def test_launcher_reports_a_refusal(login_node: Cluster, tmp_path: Path) -> None:
    config = small_config_file(tmp_path)
    launcher = Path(__file__).parents[2] / "launchers" / "submit.py"
    done = subprocess.run(
        [sys.executable, launcher, config, "slurm.training.partition=nowhere"],
        text=True,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Slurm refuses the job: ")
    assert "Traceback" not in done.stderr


def test_prepare_run(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run = prepare_run(config)
    assert load_config(run.config) == config
    assert stat.S_IMODE(run.secret.stat().st_mode) == 0o600
    assert len(bytes.fromhex(run.secret.read_text())) == 32
    (start,) = json.loads(run.provenance.read_text())["starts"]
    assert start["versions"]["torchspec_hpc"] == torchspec_hpc.__version__
    assert start["argv"] == sys.argv
    data = Path(config.dataset.train_data_path).stat()
    assert list(start["data"].values()) == [{"bytes": data.st_size, "modified": data.st_mtime}]
    assert run.job.is_dir()

    with pytest.raises(UserError, match="exists"):
        prepare_run(config)
    secret = run.secret.read_text()
    prepare_run(config, resume=True)
    assert run.secret.read_text() == secret


def test_the_code_is_frozen(tmp_path: Path) -> None:
    """A queued job runs what was there when it was submitted, wherever it is started."""
    run = prepare_run(small_config(tmp_path))
    marked = run.code / "torchspec_hpc" / "__init__.py"
    marked.write_text(marked.read_text() + "MARK = 1\n")
    code = "import torchspec_hpc, torchspec_hpc.slurm.supervisor; print(torchspec_hpc.MARK)"
    env = {**os.environ, "PYTHONPATH": str(run.code)}
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, cwd=run.code, env=env, text=True, capture_output=True)
    assert done.stdout == "1\n", done.stderr
    prepare_run(small_config(tmp_path), resume=True)  # takes the code as it is then
    assert "MARK" not in marked.read_text()
    assert [path.name for path in run.root.glob(".code*")] == []


def test_prepare_run_again_for_the_same_job(tmp_path: Path) -> None:
    config = small_config(tmp_path)
    run = prepare_run(config, job="12")
    before = run.provenance.read_text()
    assert prepare_run(config, job="12").root == run.root
    assert run.provenance.read_text() == before
    with pytest.raises(UserError, match="exists"):
        prepare_run(config, job="13")
    prepare_run(config, job="13", resume=True)
    assert RunRecord.read(run) == RunRecord(run.run_id, "slurm", "13")


def test_resume_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run to resume"):
        prepare_run(small_config(tmp_path), resume=True)


def test_resume_of_a_run_that_is_alive(tmp_path: Path) -> None:
    run = prepare_run(small_config(tmp_path))
    before = run.config.read_text()
    other = small_config(tmp_path, time="00:20:00")
    with run_lock(run, None), pytest.raises(RunLocked, match="written to by a local run"):
        prepare_run(other, resume=True)
    assert run.config.read_text() == before
    prepare_run(other, resume=True)
    with run_lock(run, "12"):
        prepare_run(other, resume=True, job="12")


def test_what_was_interrupted_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(run: RunDir) -> None:
        raise KeyboardInterrupt

    config = small_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("torchspec_hpc.slurm.prepare.snapshot_code", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_run(config)
    run = prepare_run(config, resume=True)
    assert load_config(run.config) == config


def test_a_resumed_run_has_no_ending(tmp_path: Path) -> None:
    """Its job may fail before the supervisor says so, and joined engines look at it too."""
    run = prepare_run(small_config(tmp_path))
    for path in (run.exit_codes, run.endpoints):
        path.write_text("{}")
    prepare_run(small_config(tmp_path), resume=True)
    assert not run.exit_codes.exists()
    assert not run.endpoints.exists()


def test_unwritable_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the run directory"):
        prepare_run(small_config(tmp_path / "file"))


def test_local_configuration_is_not_submitted(tmp_path: Path) -> None:
    config = small_config(tmp_path).model_copy(update={"cluster": "local"})
    with pytest.raises(ConfigError, match="cluster=slurm"):
        submit(config)


def test_without_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no squeue on this machine\n.*login node"):
        submit(small_config(tmp_path / "runs"))


def test_settings_that_a_script_of_ones_own_must_have_in_its_header(tmp_path: Path) -> None:
    slurm = {
        "account": "proj",
        "setup": ["module load cuda"],
        "network_interface": "ib0",
        "inference": {"cpus_per_task": 4, "mem": "1G"},
        "time": "04:00:00",  # the default
        "signal_before_s": 600,
        "training": {"extra": ["--exclusive"]},
    }
    assert header_settings(small_config(tmp_path, **slurm).slurm) == [
        "slurm.account",
        "slurm.setup",
        "slurm.inference.mem",
        "slurm.training.extra",
    ]


def test_never_imports_torch() -> None:
    """The login node must answer in a fraction of a second."""
    names = [m.name for m in pkgutil.iter_modules(torchspec_hpc.slurm.__path__)]
    assert "submit" in names
    code = f"import sys; from torchspec_hpc.slurm import {', '.join(names)}\n"
    code += "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "set()\n"


def test_run_id_depends_on_the_path(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "a" / "run").run_id != RunDir(tmp_path / "b" / "run").run_id
    assert RunDir(tmp_path / "run").run_id.startswith("run-")
