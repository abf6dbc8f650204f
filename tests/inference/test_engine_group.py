"""The session of an engine's processes, and a vLLM engine on two nodes for real."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.inference.conftest import Reference, Requester, make_run, random_prompts
from tests.inference.test_worker import Trainer, worker
from tests.services import local_endpoints
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.errors import DeadlineExceeded
from torchspec_hpc.inference.engine_group import EngineGroup
from torchspec_hpc.inference.placement import Placement
from torchspec_hpc.transfer.messages import Receipt


def member(run: RunDir, node: int) -> EngineGroup:
    endpoints = local_endpoints("127.0.0.1:1", "127.0.0.1:2")
    return EngineGroup(run, endpoints, Placement(0, node, 2, (0,)))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_a_session_is_joined_by_all(run: RunDir) -> None:
    session = member(run, 0).lead()
    assert member(run, 1).join(1) == session
    assert member(run, 2).join(1) == session
    assert session.address == "127.0.0.1"
    assert session.port > 0


def test_a_session_is_not_joined_twice(run: RunDir) -> None:
    """A process that was started again waits for a new session, and breaks the old one."""
    member(run, 0).lead()
    member(run, 1).join(1)
    with pytest.raises(DeadlineExceeded, match="the first process of the engine"):
        member(run, 1).join(0.3)
    assert not list((run.control / "engines").glob("*.json"))
    new = member(run, 0).lead()
    assert member(run, 1).join(1) == new


def test_who_leaves_ends_the_session(run: RunDir) -> None:
    leader = member(run, 0)
    leader.lead()
    leader.leave()
    with pytest.raises(DeadlineExceeded):
        member(run, 1).join(0.3)


@pytest.mark.vllm
@pytest.mark.long
def test_an_engine_on_two_nodes(
    services: Endpoints,
    requester: Requester,
    reference: Reference,
    tmp_path: Path,
    tiny_target: Path,
) -> None:
    """Two ranks, each a node with one device slot: tensor parallel over both, without Ray.

    The second one is killed: the first one notices and ends, to be started again.
    """
    run = make_run(
        tmp_path / "run",
        tiny_target,
        services,
        inference={
            "engine": "vllm",
            "inference_num_gpus": 2,
            "inference_num_gpus_per_engine": 2,
            "max_num_batched_tokens": 64,
            "vllm": {"tp_size": 2, "kv_cache_bytes": 64 << 20},
        },
        control={"engine_ready_s": 120},
    )
    trainer = Trainer(services.control, requester)
    with worker(run, "--num-ranks=2") as first, worker(run, "--rank=1", "--num-ranks=2") as second:
        tokens = {trainer.ask(ids).ticket: ids for ids in random_prompts([1, 70, 200], seed=14)}
        for _ in tokens:
            receipt = trainer.reply(timeout_s=200)
            assert isinstance(receipt, Receipt)
            assert receipt.engine == 0
            states = requester.fetch(receipt.key, receipt.shape)
            reference.check(tokens[receipt.ticket], states)
        second.send_signal(signal.SIGKILL)
        with worker(run, "--rank=1", "--num-ranks=2"):  # as its shepherd would
            assert first.wait(60) == 1
    trainer.control.close()
