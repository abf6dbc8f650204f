"""The supervisor over local processes: how an attempt ends, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import command_lines
from tests.slurm.fake_workers.plan import Plan
from tests.slurm.supervised import Run, make_run
from torchspec_hpc.errors import UserError
from torchspec_hpc.slurm.local import run_local

FOREVER = 100_000


def test_a_finished_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=5, leave_orphan=True, use_torch=True))
    assert run.supervise() == 0, run.log
    assert run.dir.done.is_file()
    assert run.outcome()["codes"] == {"inference": None, "training": 0}
    assert run.outcome()["message"] == "done: 5 steps"
    logs = run.dir.latest_logs
    assert {p.name for p in logs.glob("*.log")} == {
        "supervisor.log", "mooncake_master.log", "control_store.log",
        "inference_step.log", "training_step.log",
    }  # fmt: skip
    endpoints = json.loads(run.dir.endpoints.read_text())
    assert endpoints["run_id"] == run.dir.run_id
    assert endpoints["attempt"] == 0
    assert list(endpoints["addresses"].values()) == ["127.0.0.1"]
    # nothing to do the second time
    assert run.supervise() == 0
    assert run.steps() == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_signals_end_in_a_checkpoint_from_which_the_next_attempt_goes_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=40, step_s=0.1))
    signals = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    for attempt, number in enumerate(signals):
        process = run.start()
        run.wait_step(10 * attempt + 1)
        process.send_signal(number)
        assert run.finish(process) == 85, run.log
        saved = run.dir.latest_checkpoint.read_text().strip().replace("_", " ")
        assert json.loads(run.dir.stop.read_text())["reason"] == number.name
        assert run.outcome()["message"] == f"stopped with a checkpoint of {saved}"
        assert f"torchspec-hpc run {run.dir.config} --resume" in run.log
    assert run.supervise() == 0, run.log
    assert run.steps() == list(range(1, 41))
    assert run.dir.latest_logs.readlink().name == "attempt_3"
    attempts = json.loads(run.dir.attempts.read_text())
    assert [attempt["exit_code"] for attempt in attempts] == [85, 85, 85, 0]
    assert [a["last_step"] for a in attempts[:-1]] == [a["first_step"] for a in attempts[1:]]


def test_asked_to_stop_before_anything_runs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=FOREVER))
    process = run.start()
    run.wait(run.dir.attempts.exists)
    process.send_signal(signal.SIGTERM)
    assert run.finish(process) == 85, run.log


def test_a_second_interrupt_kills(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=FOREVER, deaf=True))
    process = run.start()
    run.wait_step(1)
    process.send_signal(signal.SIGINT)
    run.wait(run.dir.stop.exists)
    process.send_signal(signal.SIGINT)
    assert run.finish(process, 10) == 130, run.log


def test_trainers_that_do_not_stop_are_killed(tmp_path: Path) -> None:
    plan = Plan(num_steps=FOREVER, deaf=True, save_every=2)
    run = make_run(tmp_path / "r", plan, control={"stop_grace_s": 0.5})
    process = run.start()
    run.wait_step(3)
    process.send_signal(signal.SIGTERM)
    assert run.finish(process, 10) == 85, run.log
    assert "control.stop_grace_s" in run.outcome()["message"]


def test_a_killed_supervisor_leaves_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=FOREVER, leave_orphan=True))
    process = run.start()
    run.wait_step(1)
    process.kill()
    process.communicate()
    run.wait(lambda: not run.processes())


@pytest.mark.parametrize(
    ("plan", "code", "message"),
    [
        (Plan(crash_at=2, crash_code=1), 1, "the loss is not finite"),
        (Plan(crash_at=2, crash_code=2), 2, "the data is no good"),
        (Plan(crash_at=2, crash_code=7), 7, "the training step ended with 7"),
        (Plan(num_steps=FOREVER, engine="user error"), 2, "there is no model in /nowhere"),
        (Plan(num_steps=FOREVER, engine="die"), 3, "the engine has a fit"),
    ],
    ids=lambda value: None if isinstance(value, (int, str)) else f"{value.engine}-{value.crash_at}",
)
def test_a_failure_ends_the_run_with_one_message(
    tmp_path: Path, plan: Plan, code: int, message: str
) -> None:
    control = {"engine_restarts": 0}
    run = make_run(tmp_path / "r", plan, inference={"inference_num_gpus": 2}, control=control)
    assert run.supervise() == code, run.log
    assert message in run.outcome()["message"]
    assert message in run.log
    assert "Traceback" not in run.log
    assert "to go on: torchspec-hpc run" in run.log


def test_an_engine_that_dies_is_started_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=100, step_s=0.1, engine="die twice"))
    assert run.supervise(60) == 0, run.log
    assert (run.root / "starts").read_text().count("start") == 3
    assert "restart 2 of 5 in 2 s" in (run.dir.latest_logs / "inference_step.log").read_text()
    assert "inference rank 0 is ready" in run.log


def test_an_engine_that_cannot_start_is_reported_and_not_missed(tmp_path: Path) -> None:
    plan = Plan(num_steps=80, step_s=0.1, engine="one user error")
    run = make_run(tmp_path / "r", plan, inference={"inference_num_gpus": 2})
    assert run.supervise() == 0, run.log
    assert run.log.count("there is no model in /nowhere") == 1
    assert "restart" not in (run.dir.latest_logs / "inference_step.log").read_text()


def test_engines_that_stay_dead_cost_no_step(tmp_path: Path) -> None:
    plan = Plan(num_steps=FOREVER, engine="die later")
    run = make_run(tmp_path / "r", plan, control={"engine_restarts": 1})
    assert run.supervise() == 137, run.log
    assert "all engines have ended, the first with 137" in run.outcome()["message"]
    assert run.outcome()["codes"]["training"] == 85
    assert run.dir.latest_checkpoint.read_text().strip() == f"step_{run.steps()[-1]}"


def test_an_engine_that_never_gets_ready(tmp_path: Path) -> None:
    plan = Plan(num_steps=FOREVER, step_s=60, engine="never ready")
    run = make_run(tmp_path / "r", plan, control={"engine_ready_s": 0.1})
    assert run.supervise() == 1, run.log
    assert "control.engine_ready_s" in run.outcome()["message"]


@pytest.mark.parametrize(("section", "key"), [("mooncake", "master_port"), ("control", "port")])
def test_a_port_in_use_is_named(tmp_path: Path, section: str, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = make_run(tmp_path / "r", Plan(), **{section: {key: port}})
        assert run.supervise() == 2, run.log
    assert f"{section}.{key} = {port}: the port is in use" in run.outcome()["message"]
    assert "Traceback" not in run.log


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(), control={"host": "192.0.2.1"})
    assert run.supervise() == 2, run.log
    assert "control.host" in run.outcome()["message"]


def test_a_service_that_dies_ends_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=FOREVER))
    process = run.start()
    run.wait_step(1)
    end(run, "control_store")
    assert run.finish(process) == 1, run.log
    assert "the control store ended with" in run.outcome()["message"]
    assert run.dir.latest_checkpoint.read_text().strip() == f"step_{run.steps()[-1]}"


def test_an_unwritable_run_directory(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(), cluster="local")
    run.dir.ready.rmdir()
    run.dir.ready.touch()
    with pytest.raises(UserError, match="cannot write the run directory"):
        run_local(run.dir)


def test_a_batch_script_outside_of_a_het_job(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(), cluster="slurm")
    module = ["-m", "torchspec_hpc.slurm.supervisor", "--run-dir", run.dir.root]
    done = subprocess.run([sys.executable, *module], text=True, capture_output=True)
    assert done.returncode == 1
    assert "SLURM_HET_SIZE is not set" in done.stderr
    assert "SLURM_HET_SIZE is not set" in run.outcome()["message"]


def end(run: Run, name: str) -> None:
    """Kills a service of this run, not its shepherd."""
    port = json.loads(run.dir.endpoints.read_text())["control"].split(":")[1]
    for process, words in command_lines().items():
        if any(name in word for word in words) and port in words and "--" not in words:
            os.kill(process, signal.SIGKILL)


def test_a_cancelled_run_is_not_started(tmp_path: Path) -> None:
    """It was cancelled between the job's start and ours."""
    run = make_run(tmp_path / "r", Plan())
    run.dir.cancelled.touch()
    assert run.supervise() == 2
    assert "was cancelled\n  next:    to go on with it: torchspec-hpc resume" in run.log
    assert not run.dir.metrics.exists()
