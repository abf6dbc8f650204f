"""What a trainer's stream survives; the tests play the engines, on connections of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.transfer.test_feed import (
    LONG_S,
    is_stored,
    put,
    serve,
    states_of,
    tokens,
    wait_until,
)
from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.feed import HiddenStateFeed
from torchspec_hpc.transfer.messages import Receipt, Request
from torchspec_hpc.transfer.store import HiddenStateStore

RANK = 7
HEARTBEAT_S = 0.1
#: So long that no test waits for it: what is asked again before is asked for another reason.
DEADLINE_S = 600.0


@pytest.fixture
def control(connect: Callable[[], ControlClient]) -> ControlClient:
    """Connection of an engine that sends no heartbeats."""
    return connect()


@pytest.fixture
def feed(
    connect: Callable[[], ControlClient], trainer: HiddenStateStore
) -> Iterator[HiddenStateFeed]:
    client = connect()
    while client.pop_reply(RANK, 0):
        pass
    client.pop_taken(RANK)
    settings = ControlConfig(request_deadline_s=DEADLINE_S, heartbeat_s=HEARTBEAT_S)
    feed = HiddenStateFeed(client, trainer, RANK, settings, f"run.{time.monotonic_ns()}")
    yield feed
    feed.close()


def beat(engine: ControlClient, rank: int) -> None:
    engine.heartbeat("inference", rank, {"ready": True})


def take(control: ControlClient) -> Request:
    request = control.pop_request(LONG_S)
    assert request is not None, "nothing was asked for"
    return request


def receipt_of(request: Request, checksum: int | None) -> Receipt:
    shape = tuple(states_of(request).shape)
    return Receipt(request.ticket, request.key, shape, "float32", 2, checksum)


def damage(states: torch.Tensor) -> torch.Tensor:
    damaged = states.clone()
    damaged.view(-1).view(torch.uint8)[-1] ^= 1
    return damaged


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (damage, "checksum"),
        (lambda states: states[:-1], "bytes came"),
        (lambda states: torch.cat([states, states]), "more than the expected"),
        (torch.zeros_like, "checksum"),
    ],
    ids=["one bit", "short", "long", "zeros"],
)
@pytest.mark.parametrize("num_tokens", [3, 1000])
def test_a_damaged_object_is_asked_for_again(
    feed: HiddenStateFeed,
    control: ControlClient,
    engine: HiddenStateStore,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    word: str,
    num_tokens: int,
) -> None:
    feed.submit("s", tokens(num_tokens, first=1))
    request = take(control)
    checksum = engine.put(f"{request.key}/whole", states_of(request), request.segment)
    engine.put(request.key, spoil(states_of(request)).contiguous(), request.segment)
    control.push_reply(RANK, receipt_of(request, checksum))
    assert serve(control, engine).attempt_no == 1
    assert torch.equal(feed.take("s"), states_of(request))
    assert word in caplog.text
    assert not is_stored(engine, request.key)


def test_receipts_that_come_twice_deliver_once(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    for name in ("s", "t"):
        feed.submit(name, tokens(3))
        request = take(control)
        receipt = put(engine, request)
        for _ in range(3):
            control.push_reply(RANK, receipt)
        assert torch.equal(feed.take(name), states_of(request))
    assert (feed.stats().num_samples, feed.stats().num_retries) == (2, 0)


def test_what_a_restarted_engine_had_taken_is_asked_again_at_once(
    feed: HiddenStateFeed, connect: Callable[[], ControlClient], engine: HiddenStateStore
) -> None:
    first = connect()
    beat(first, 3)
    feed.submit("s", tokens(3))
    take(first)
    time.sleep(2 * HEARTBEAT_S)  # it was seen alive
    second = connect()
    beat(second, 3)
    assert serve(second, engine).attempt_no == 1
    feed.take("s")


def test_what_a_silent_engine_had_taken_is_asked_again_soon(
    feed: HiddenStateFeed,
    connect: Callable[[], ControlClient],
    engine: HiddenStateStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hung, other = connect(), connect()
    beat(hung, 4)
    beat(other, 5)
    feed.submit("s", tokens(3))
    slow = take(hung)
    assert serve(other, engine).attempt_no == 1
    feed.take("s")
    assert "engine 4 took it and is gone" in caplog.text
    hung.push_reply(RANK, put(engine, slow))  # it was not dead after all
    wait_until(lambda: not is_stored(engine, slow.key))


def test_what_an_engine_took_without_a_word_is_asked_again_soon(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    feed.submit("t", tokens(3))
    take(control)
    time.sleep(8 * HEARTBEAT_S)
    assert serve(control, engine).ticket == "t", "what is in the queue is not sent twice"
    assert serve(control, engine).attempt_no == 1
    for name in ("s", "t"):
        feed.take(name)


def test_a_slow_engine_is_not_asked_twice(
    feed: HiddenStateFeed, connect: Callable[[], ControlClient], engine: HiddenStateStore
) -> None:
    slow = connect()
    feed.submit("s", tokens(3))
    beat(slow, 6)
    request = take(slow)
    for _ in range(12):
        time.sleep(HEARTBEAT_S)
        beat(slow, 6)
    assert slow.queue_depth() == 0
    slow.push_reply(RANK, put(engine, request))
    feed.take("s")
    assert feed.stats().num_retries == 0


def test_what_a_killed_engine_writes_last_is_removed_later(
    connect: Callable[[], ControlClient], trainer: HiddenStateStore, engine: HiddenStateStore
) -> None:
    settings = ControlConfig(request_deadline_s=0.5, heartbeat_s=HEARTBEAT_S)
    feed = HiddenStateFeed(connect(), trainer, RANK, settings, f"run.{time.monotonic_ns()}")
    control = connect()
    feed.submit("s", tokens(3))
    lost = take(control)
    serve(control, engine)
    feed.take("s")
    put(engine, lost)  # and dies before the receipt
    wait_until(lambda: not is_stored(engine, lost.key))
    feed.close()
