"""Engines that are killed, hang and dawdle: the losses are those of an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import ConfigWriter, engines_of, losses, torchspec_hpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 40
LONG_S = 240.0
#: Nothing here may wait for the deadline of a request, except where a test shortens it.
CONTROL = {
    "heartbeat_s": 0.5,
    "engine_ready_s": 240,
    "engine_restarts": 20,
    "request_deadline_s": 600,
    "request_max_tries": 20,
}
TRAINING = {"num_train_steps": STEPS, "prefetch_depth": 2}
TWO_ENGINES = {"inference_num_gpus": 2, "inference_num_gpus_per_node": 2}


def wait_until(condition: Callable[[], object], run: Path) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline, supervisor_log(run)
        time.sleep(0.02)


def wait_step(run: Path, step: int) -> None:
    wait_until(lambda: max(logged(run), default=0) >= step, run)


def logged(run: Path) -> list[int]:
    return list(losses(run)) if (run / "metrics.jsonl").is_file() else []


def supervisor_log(run: Path) -> str:
    path = run / "logs" / "latest" / "supervisor.log"
    return path.read_text() if path.is_file() else "no supervisor's log"


@contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    program = Path(sys.executable).with_name("torchspec-hpc")
    process = subprocess.Popen(
        [program, "run", config], text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def send(run: Path, rank: int, *signals: signal.Signals, pause_s: float = 0.0) -> None:
    """Signals an engine, once it is there; one that ends meanwhile needs none."""
    wait_until(lambda: engines_of(run, rank), run)
    for number in signals:
        for pid in engines_of(run, rank):
            os.kill(pid, number)
        time.sleep(pause_s)


def test_no_fault_of_an_engine_changes_a_bit(config_file: ConfigWriter, tmp_path: Path) -> None:
    sections = {"cluster": "local", "training": TRAINING, "inference": TWO_ENGINES}
    quiet = torchspec_hpc("run", config_file(run_name="quiet", **sections), timeout_s=LONG_S)
    assert quiet.returncode == 0, quiet.stderr
    config = config_file(run_name="disturbed", control=CONTROL, **sections)
    run = tmp_path / "runs" / "disturbed"
    with running(config) as process:
        wait_step(run, 2)
        send(run, 0, signal.SIGKILL)
        send(run, 1, signal.SIGSTOP)  # hangs, with what it had taken: nothing goes on
        is_ready = run / "control" / "ready" / "inference_0.json"
        wait_until(lambda: not is_ready.exists(), run)
        wait_until(is_ready.exists, run)  # started again
        wait_step(run, 10)
        send(run, 1, signal.SIGCONT)  # and answers what others have answered
        wait_step(run, 14)
        send(run, 0, signal.SIGKILL)
        while logged(run)[-1] < 30:  # slow
            send(run, 1, signal.SIGSTOP, signal.SIGCONT, pause_s=0.1)
        assert process.wait(LONG_S) == 0, supervisor_log(run)
    assert losses(run) == losses(tmp_path / "runs" / "quiet")
    assert list(losses(run)) == list(range(1, STEPS + 1))
    # which requests a fault hits is chance, and with luck none
    step_log = (run / "logs" / "latest" / "inference_step.log").read_text()
    assert step_log.count("ended with 137; restart") == 2


def test_a_run_without_engines_saves_and_says_why(
    config_file: ConfigWriter, tmp_path: Path
) -> None:
    """The only engine is killed, and what is started in its place hangs before it is ready."""
    config = config_file(
        cluster="local",
        training={**TRAINING, "num_train_steps": 2000},
        control={**CONTROL, "engines_lost_s": 5},
    )
    run = tmp_path / "runs" / "tiny"
    with running(config) as process:
        wait_step(run, 3)
        (first,) = engines_of(run)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: engines_of(run) not in ([], [first]), run)
        send(run, 0, signal.SIGSTOP)
        assert process.wait(LONG_S) == 1
    saved = (run / "checkpoints" / "latest").read_text().strip()
    assert saved == f"step_{logged(run)[-1]}"
    assert "(control.engines_lost_s)" in (run / "control" / "exit_codes.json").read_text()
