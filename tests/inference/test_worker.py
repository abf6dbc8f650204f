"""The worker process, with a real control store and a real Mooncake."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from tests.inference.conftest import Reference, Requester, make_run, random_prompts
from tests.services import SECRET, control_server
from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.inference.worker import main
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import Receipt, Refusal, Request
from torchspec_hpc.transfer.store import HiddenStateStore, StoreFull

ROOT = Path(__file__).parents[2]


@contextmanager
def worker(run: RunDir, *argv: str, **env: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torchspec_hpc.inference.worker", "--run-dir", str(run.root)]
    process = subprocess.Popen(
        [*command, *argv], cwd=ROOT, env={**os.environ, **env}, start_new_session=True
    )
    try:
        yield process
    finally:  # with what it started, as a shepherd does
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Trainer:
    """Rank 3 of the trainers: asks, and collects what comes back."""

    rank = 3

    def __init__(self, endpoint: str, requester: Requester) -> None:
        self.control = ControlClient(endpoint, SECRET, timeout_s=10)
        self.requester = requester
        self.open: dict[str, Request] = {}

    def ask(self, token_ids: np.ndarray) -> Request:
        request = self.requester.request(token_ids)
        request = msgspec.structs.replace(request, reply_to=self.rank)
        self.open[request.ticket] = request
        self.control.push_request(request)
        return request

    def reply(self, timeout_s: float = 60) -> Receipt | Refusal | None:
        reply = self.control.pop_reply(self.rank, timeout_s)
        if reply is not None:
            self.open.pop(reply.ticket)
        return reply

    def beats(self) -> dict[int, dict[str, Any]]:
        return self.control.heartbeats("inference")

    def wait_ready(self, *ranks: int) -> None:
        wait_for(lambda: all(self.beats().get(rank, {}).get("ready") for rank in ranks))


@dataclass
class Scene:
    """A run with its services, somebody who asks, and a worker."""

    run: RunDir
    trainer: Trainer
    process: subprocess.Popen[str]


def wait_for(condition: Callable[[], Any], deadline_s: float = 60) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def scene(
    services: Endpoints,
    requester: Requester,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target: Path,
) -> Iterator[Scene]:
    """One worker for the tests of ordinary requests."""
    run = make_run(
        tmp_path_factory.mktemp("worker") / "run",
        tiny_target,
        services,
        mooncake={"put_deadline_s": 0.2},
    )
    trainer = Trainer(services.control, requester)
    with worker(run) as process:
        yield Scene(run, trainer, process)
    trainer.control.close()


def test_every_request_gets_its_reply(scene: Scene, reference: Reference) -> None:
    trainer = scene.trainer
    prompts = random_prompts([1, 30, 200, 64, 64], seed=8)
    requests = [trainer.ask(ids) for ids in prompts]
    refused = trainer.ask(random_prompts([201])[0])
    replies = {reply.ticket: reply for reply in [trainer.reply() for _ in range(6)]}
    for ids, request in zip(prompts, requests, strict=True):
        receipt = replies[request.ticket]
        assert (receipt.key, receipt.dtype, receipt.engine) == (request.key, "float32", 0)
        reference.check(ids, trainer.requester.fetch(receipt.key, receipt.shape))
    refusal = replies[refused.ticket]
    assert refusal == Refusal(refused.ticket, refused.key, refusal.reason, permanent=True)
    assert "201 tokens" in refusal.reason
    wait_for(lambda: trainer.beats()[0]["tokens"] == 359)
    beat = trainer.beats()[0]
    assert beat["ready"]
    assert beat["refused"] == 1
    assert 0 < beat["steps"] <= 6
    assert beat["busy_s"] > 0


def test_the_last_request_of_an_idle_engine_is_delivered_at_once(scene: Scene) -> None:
    scene.trainer.wait_ready(0)
    time.sleep(1)
    start = time.monotonic()
    scene.trainer.ask(random_prompts([30])[0])
    assert isinstance(scene.trainer.reply(), Receipt)
    assert time.monotonic() - start < 5


def test_messages_that_are_not_ours_are_dropped(scene: Scene) -> None:
    trainer = scene.trainer
    endpoint = Endpoints.read(scene.run, 1).control
    stranger = ControlClient(endpoint, b"another run's secret", timeout_s=10)
    stranger.push_request(Request("forged", 0, trainer.rank, "x:1", "key", b"1234"))
    stranger.close()
    trainer.control.push_request(Request("broken", 0, trainer.rank, "x:1", "key", b"123"))
    asked = trainer.ask(random_prompts([10])[0])
    assert trainer.reply().ticket == asked.ticket
    assert trainer.reply(timeout_s=0.3) is None


def test_a_full_store_refuses_for_now(scene: Scene, services: Endpoints) -> None:
    mooncake = load_config(scene.run.config).mooncake
    filler = HiddenStateStore.open(mooncake, services, segment_bytes=0, deadline_s=20)
    trainer, keys = scene.trainer, []

    def fill(num_bytes: int) -> None:
        keys.append(f"filler-{len(keys)}")
        piece = torch.zeros(num_bytes, dtype=torch.uint8)
        filler.put(keys[-1], piece, trainer.requester.store.segment)

    with pytest.raises(StoreFull):
        any(fill(size) for size in [1 << 20] * 60 + [1 << 16] * 100)
    trainer.ask(random_prompts([200])[0])
    refusal = trainer.reply()
    for key in keys:
        filler.remove(key)
    filler.close()
    assert isinstance(refusal, Refusal)
    assert not refusal.permanent
    assert "no room" in refusal.reason
    trainer.ask(random_prompts([200])[0])
    assert isinstance(trainer.reply(), Receipt)


def test_sigusr1_is_ignored_and_sigint_obeyed(scene: Scene) -> None:
    scene.process.send_signal(signal.SIGUSR1)  # for the supervisor, not for us
    scene.trainer.ask(random_prompts([5])[0])
    assert isinstance(scene.trainer.reply(), Receipt)
    start = time.monotonic()
    scene.process.send_signal(signal.SIGINT)
    assert scene.process.wait(30) == 0
    assert time.monotonic() - start < 10
    assert list(scene.run.errors.iterdir()) == []
    assert json.loads((scene.run.ready / "inference_0.json").read_text())["ready"]
    [log] = scene.run.logs.rglob("inference_rank0_*.log")
    assert "engine hf is ready" in log.read_text()
    assert "SIGINT: leaving" in log.read_text()


@pytest.mark.slow
def test_losing_an_engine_and_then_the_control_store(
    services: Endpoints,
    requester: Requester,
    reference: Reference,
    tmp_path: Path,
    tiny_target: Path,
) -> None:
    with control_server() as server:
        run = make_run(
            tmp_path / "run",
            tiny_target,
            replace(services, control=server.endpoint),
            inference={
                "inference_num_gpus": 2,
                "inference_num_gpus_per_node": 2,
                "inference_batch_size": 1,
            },
            control={"service_ready_s": 2},
        )
        trainer = Trainer(server.endpoint, requester)
        with (
            worker(run, "--rank=0", "--num-ranks=2") as first,
            worker(run, SLURM_PROCID="1", SLURM_NTASKS="2") as second,
        ):
            trainer.wait_ready(0, 1)
            _kill_one_engine_midway(trainer, reference, first)
            server.process.kill()
            assert second.wait(30) == 1
        trainer.control.close()
    error = json.loads((run.errors / "inference_1.json").read_text())
    assert f"control store at {server.endpoint}" in error["error"]
    assert error["exit_code"] == 1


def _kill_one_engine_midway(
    trainer: Trainer, reference: Reference, victim: subprocess.Popen[str]
) -> None:
    tokens = {trainer.ask(ids).ticket: ids for ids in random_prompts([120] * 60, seed=9)}
    receipts = [trainer.reply() for _ in range(10)]
    victim.kill()
    while reply := trainer.reply(timeout_s=2):
        receipts.append(reply)
    # what the victim had taken is lost, two open ones and what it was writing: we ask again
    assert len(trainer.open) < 10
    for lost in list(trainer.open.values()):
        # under a new key, as a trainer does: the victim may have died in the middle of its put
        key = f"{lost.key}/again"
        trainer.control.push_request(msgspec.structs.replace(lost, attempt_no=1, key=key))
        receipts.append(trainer.reply())
    assert {receipt.ticket for receipt in receipts} == tokens.keys()
    assert {receipt.engine for receipt in receipts} == {0, 1}
    for receipt in receipts:
        states = trainer.requester.fetch(receipt.key, receipt.shape)
        reference.check(tokens[receipt.ticket], states)


@pytest.fixture
def _process_state() -> Iterator[None]:
    """Takes back what the worker's main changes in this process."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    }
    root = logging.getLogger()
    log_handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = log_handlers, level
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_process_state")
@pytest.mark.parametrize(
    ("sections", "argv", "message"),
    [
        ({"inference": {"engine": "sglang"}}, [], "the package sglang is not installed"),
        ({}, ["--num-ranks=2"], "2 ranks for 1 engines"),
        ({"model": {"target_model_path": "/missing"}}, [], "/missing"),
        ({"inference": {"aux_hidden_states_layers": [5]}}, [], "the 4 layers of"),
    ],
)
def test_what_cannot_start_says_why(
    services: Endpoints,
    tmp_path: Path,
    tiny_target: Path,
    sections: Any,
    argv: list[str],
    message: str,
) -> None:
    run = make_run(tmp_path / "run", tiny_target, services, **sections)
    assert main(["--run-dir", str(run.root), *argv]) == 2
    error = json.loads((run.errors / "inference_0.json").read_text())
    assert message in error["error"]
    assert error["exit_code"] == 2


@pytest.mark.usefixtures("_process_state")
def test_gives_up_on_services_that_do_not_come(
    services: Endpoints, tmp_path: Path, tiny_target: Path
) -> None:
    control = {"service_ready_s": 0.3}
    run = make_run(tmp_path / "run", tiny_target, services, control=control)
    run.endpoints.unlink()
    assert main(["--run-dir", str(run.root)]) == 1
    error = json.loads((run.errors / "inference_0.json").read_text())
    assert "the services' addresses" in error["error"]
