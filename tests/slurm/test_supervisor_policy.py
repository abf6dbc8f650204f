"""What the supervisor decides and composes, without any process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.fake_workers.plan import Plan
from tests.slurm.supervised import make_run
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.errors import ConfigError, TorchspecError
from torchspec_hpc.slurm import watch
from torchspec_hpc.slurm.attempts import Attempt, History
from torchspec_hpc.slurm.cost import run_cost
from torchspec_hpc.slurm.failures import read_failures, root_cause
from torchspec_hpc.slurm.job import Job, JobFate, read_fate
from torchspec_hpc.slurm.job_info import JobInfo
from torchspec_hpc.slurm.local import LocalLauncher, split_gpus
from torchspec_hpc.slurm.processes import Child
from torchspec_hpc.slurm.record import RunRecord
from torchspec_hpc.slurm.requeue import Ending, Rules, decide
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.slurm.srun import own_ip
from torchspec_hpc.slurm.steps import Step, worker_environment
from torchspec_hpc.slurm.watch import last_logged_step, stop_grace_s, write_stop

RULES = Rules(can_requeue=True, max_requeues=9)
LOCAL = replace(RULES, can_requeue=False)
LAST = replace(RULES, max_requeues=2)


def history(*steps: int) -> list[Attempt]:
    """Attempts by the step of the checkpoint at the start of the first and the end of each."""
    pairs = enumerate(itertools.pairwise(steps))
    return [Attempt(i, "7", 0.0, first, last, 1.0, 0) for i, (first, last) in pairs]


@pytest.mark.parametrize(
    ("code", "steps", "rules", "requeue", "reason"),
    [
        (0, (0, 9), RULES, False, ""),
        (2, (0, 9), RULES, False, "only its user can mend"),
        (85, (0, 9), RULES, True, "from step 9 on"),
        (85, (0, 9), LOCAL, False, "does not requeue itself"),
        (85, (9, 9), RULES, True, "from step 9 on, without progress"),
        (85, (0, 9, 9, 9), RULES, True, "without progress"),
        (85, (0, 9, 9, 9, 9), RULES, False, "3 attempts in a row made no checkpoint"),
        (85, (0, 1, 2, 3), LAST, False, "slurm.max_requeues"),
        (1, (0, 9), RULES, True, "from step 9 on"),
        (137, (4, 9), RULES, True, "from step 9 on"),
        (1, (0, 0), RULES, False, "without progress since step 0"),
        (7, (0, 9, 9), RULES, False, "without progress since step 9"),
        (1, (0, 1, 2, 3), LAST, False, "slurm.max_requeues"),
    ],
)
def test_the_policy(
    code: int, steps: tuple[int, ...], rules: Rules, requeue: bool, reason: str
) -> None:
    verdict = decide(Ending(code, "x"), history(*steps), rules)
    assert verdict.requeue is requeue
    assert reason in verdict.reason


def test_a_launch_that_failed_is_tried_again_but_not_for_ever() -> None:
    failed = Ending(1, "Job credential revoked", launched=False)
    assert decide(failed, history(5, 5), RULES).requeue
    assert not decide(failed, history(5, 5, 5, 5), RULES).requeue


@pytest.mark.parametrize(
    ("info", "fate"),
    [  # as Slurm 22.05 answered when SIGTERM had just arrived
        (("RUNNING", 1, "None"), JobFate.RUNNING),
        (("COMPLETING", 2, "None"), JobFate.REQUEUED),
        (("COMPLETING", 1, "TimeLimit"), JobFate.TIME_LIMIT),
        (("COMPLETING", 2, "TimeLimit"), JobFate.REQUEUED),
        (("COMPLETING", 1, "None"), JobFate.CANCELLED),
        (("GONE", None, ""), JobFate.UNKNOWN),
    ],
)
def test_what_becomes_of_the_job(info: tuple[str, int | None, str], fate: JobFate) -> None:
    state, restarts, reason = info
    assert read_fate(JobInfo("7", state, None, restarts, reason), restart_count=1) is fate


def test_a_controller_that_restarts_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    for name, answer in {
        "squeue": "7|RUNNING|0|0|None|n1|p|1|N/A|1:00|N/A|",
        "scontrol": "",
        "sacct": "",
    }.items():
        client = tmp_path / name
        client.write_text(
            f"#!/bin/sh\necho {name} >> {calls}\n[ $(grep -c {name} {calls}) -gt 2 ] || exit 1\n"
            f"echo '{answer}'\n"
        )
        client.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    patient = Job("7", 0, 1, back_off_s=(0.0, 0.0))
    assert patient.fate() is JobFate.RUNNING
    patient.requeue()
    calls.unlink()
    impatient = Job("7", 0, 1, back_off_s=(0.0,))
    assert impatient.fate() is JobFate.UNKNOWN
    with pytest.raises(TorchspecError, match="does not requeue"):
        impatient.requeue()


def test_a_full_disk_hides_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path)
    run.create()
    words = {"role": "training", "rank": 0, "node": "n1", "error": "x", "exit_code": 1}
    write_atomic(run.errors / "training_0.json", words)
    (run.errors / ".refresh").mkdir()  # in the way, as there is no disk to fill
    run.stop.mkdir()
    assert len(read_failures(run)) == 1
    write_stop(run, "x")
    assert "cannot write to the run directory" in caplog.text
    assert "cannot ask the trainers to stop" in caplog.text


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_compute_nodes_download_nothing(tmp_path: Path, cluster: str) -> None:
    config = make_run(tmp_path / "r", Plan(), cluster=cluster).config
    offline = {"slurm": "1"}.get(cluster)
    assert worker_environment(config, {}, None).get("HF_HUB_OFFLINE") == offline
    assert worker_environment(config, {"HF_HUB_OFFLINE": "0"}, None)["HF_HUB_OFFLINE"] == "0"


def test_history_survives_attempts_that_were_killed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    first = History(run)
    assert first.begin("7") == first.attempts[0]
    first.end(85, "stopped")
    History(run).begin("7")  # and then SIGKILL
    save(run, 12)
    third = History(run)
    attempt = third.begin("8")
    assert (attempt.number, attempt.first_step, attempt.job_id) == (2, 12, "8")
    assert [a.exit_code for a in third.attempts] == [85, 1, None]
    assert third.attempts[1].made_progress
    assert not third.attempts[2].made_progress


def test_a_killed_attempt_ends_with_its_last_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan()).dir
    RunRecord(run.run_id, "local").write(run)
    started = History(run).begin(None).started
    log = run.attempt_logs(0) / "supervisor.log"
    log.parent.mkdir(parents=True)
    log.touch()
    os.utime(log, (0, started + 7200))
    assert run_cost(run).hours == pytest.approx(2)
    second = History(run)
    second.begin(None)
    assert second.attempts[0].ended == pytest.approx(started + 7200)


def test_last_logged_step(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert last_logged_step(run) == 0
    run.metrics.write_text("")
    assert last_logged_step(run) == 0
    line = '{"step": %d, "train/loss": 1.0}\n'
    run.metrics.write_text("".join(line % i for i in range(1, 2000)) + '{"st')
    assert last_logged_step(run) == 1999


@pytest.mark.parametrize(
    ("cluster", "given", "warning_s", "grace_s"),
    [
        ("local", None, 600, 120),
        ("slurm", None, 600, 540),
        ("slurm", None, 60, 30),
        ("slurm", 7, 600, 7),
    ],
)
def test_the_grace_is_the_time_that_the_warning_leaves(
    tmp_path: Path, cluster: str, given: float | None, warning_s: int, grace_s: float
) -> None:
    sections: dict[str, Any] = {
        "control": {"stop_grace_s": given},
        "slurm": {"signal_before_s": warning_s, "time": "01:00:00"},
    }
    config = make_run(tmp_path / "r", Plan(), cluster=cluster, **sections).config
    assert stop_grace_s(config) == grace_s


@pytest.mark.parametrize(("done", "stop_grace_s", "code"), [(True, 60, 0), (False, 0.1, 85)])
def test_a_step_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: bool, stop_grace_s: float, code: int
) -> None:
    run = make_run(tmp_path / "r", Plan(), control={"stop_grace_s": stop_grace_s})
    logs = run.dir.root
    argv = ["sleep", "60"]
    step = Step("training", [Child(argv, logs / "step.log", {})], signal.SIGKILL)
    services = Services(run.config, "127.0.0.1", logs, "unused")
    monkeypatch.setattr(watch, "_LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "_DONE_GRACE_S", 0.0)
    if done:
        write_atomic(run.dir.done, {"step": 5})
    asked = time.monotonic()
    try:
        ending = watch.Watch(
            run.dir, logs, run.config, services, step, step, lambda: asked
        ).until_the_end()
    finally:
        step.kill()
    assert ending.exit_code == code


def test_the_root_cause_is_the_users_mistake_or_else_the_first(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.create()
    assert root_cause(read_failures(run)) is None
    for age, (rank, code) in enumerate([(3, 1), (0, 1), (1, 2)]):
        words = {"role": "training", "rank": rank, "node": "n1", "error": "x", "exit_code": code}
        path = run.errors / f"training_{rank}.json"
        write_atomic(path, words)
        os.utime(path, (age, age))
    assert [failure.rank for failure in read_failures(run)] == [3, 0, 1]
    assert root_cause(read_failures(run)).rank == 1
    (run.errors / "training_1.json").unlink()
    assert str(root_cause(read_failures(run))) == "training rank 3 on n1: x"


@pytest.mark.parametrize(
    ("visible", "engines", "trainers"),
    [
        ([], [[], []], []),
        (list("01234567"), [["0", "1"], ["2", "3"]], ["4", "5"]),
        (["0"], [["0"], ["0"]], ["0"]),
    ],
)
def test_local_gpus_are_shared_out(
    tmp_path: Path, visible: list[str], engines: list[list[str]], trainers: list[str]
) -> None:
    sections: dict[str, Any] = {
        "inference": {
            "inference_num_gpus": 4,
            "inference_num_gpus_per_engine": 2,
            "inference_num_gpus_per_node": 4,
            "vllm": {"tp_size": 2},
        },
        "training": {"training_num_gpus_per_node": 2},
    }
    config = make_run(tmp_path / "r", Plan(), **sections).config
    assert split_gpus(config, visible) == (engines, trainers)


def test_a_local_run_has_one_node(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(), training={"training_num_nodes": 2})
    with pytest.raises(ConfigError, match=r"training\.training_num_nodes = 2"):
        LocalLauncher(run.dir, run.config, os.environ)


def test_an_address_must_be_one_that_others_reach() -> None:
    assert own_ip("127.0.1.3") == "127.0.1.3"  # Slurm's own word for it
    with pytest.raises(TorchspecError, match=r"(?s)resolves to 127.*control.host"):
        own_ip("localhost")
    with pytest.raises(TorchspecError, match="does not resolve"):
        own_ip("no-such-node.invalid")


def test_exit_codes_name_every_step(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", Plan(num_steps=1))
    assert run.supervise() == 0, run.log
    assert set(json.loads(run.dir.exit_codes.read_text())) == {
        "attempt", "exit_code", "message", "reason", "codes",
    }  # fmt: skip


def save(run: RunDir, step: int) -> None:
    run.checkpoints.mkdir(exist_ok=True)
    run.latest_checkpoint.write_text(f"step_{step}\n")
