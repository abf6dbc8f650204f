"""The tests play the engine themselves, one step at a time, on a connection of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.services import Service
from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.errors import DeadlineExceeded
from torchspec_hpc.transfer.control import ControlClient, ControlLost
from torchspec_hpc.transfer.feed import GaveUp, HiddenStateFeed, SampleFailed
from torchspec_hpc.transfer.messages import (
    Generation,
    Receipt,
    Refusal,
    Request,
    encode_tokens,
)
from torchspec_hpc.transfer.store import HiddenStateStore

DEADLINE_S = 2.0
MAX_TRIES = 3
RANK = 5
QUEUED_S = 5.0
LONG_S = 20.0


@pytest.fixture
def control(connect: Callable[[], ControlClient]) -> ControlClient:
    """The engine's connection."""
    return connect()


@pytest.fixture
def feed(
    control: ControlClient, connect: Callable[[], ControlClient], trainer: HiddenStateStore
) -> Iterator[HiddenStateFeed]:
    while control.pop_reply(RANK, 0):
        pass
    deadlines = ControlConfig(
        request_deadline_s=DEADLINE_S,
        request_max_tries=MAX_TRIES,
        engine_ready_s=QUEUED_S - DEADLINE_S,
        engines_lost_s=QUEUED_S - DEADLINE_S,
    )
    feed = HiddenStateFeed(connect(), trainer, RANK, deadlines, f"run.{time.monotonic_ns()}")
    yield feed
    feed.close()


def tokens(num: int, first: int = 0) -> npt.NDArray[np.int32]:
    return np.arange(first, first + num, dtype=np.int32)


def states_of(request: Request) -> torch.Tensor:
    """[T, 4, 16]: every entry of row t is token t."""
    rows = torch.from_numpy(request.tokens.astype(np.float32))
    return rows[:, None, None].expand(-1, 4, 16).contiguous()


def put(engine: HiddenStateStore, request: Request) -> Receipt:
    """What an engine does before it tells anybody."""
    states = states_of(request)
    engine.put(request.key, states, request.segment)
    return Receipt(request.ticket, request.key, tuple(states.shape), "float32", 2)


def serve(control: ControlClient, engine: HiddenStateStore, timeout_s: float = LONG_S) -> Request:
    request = control.pop_request(timeout_s)
    assert request is not None, "nothing was asked for"
    control.push_reply(request.reply_to, put(engine, request))
    return request


def is_stored(store: HiddenStateStore, key: str) -> bool:
    return store._client.is_exist(key) == 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_samples_are_taken_in_any_order(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    for i in range(6):
        feed.submit(f"s{i}", tokens(10 + i, first=100 * i))
    keys = [serve(control, engine).key for _ in range(6)]
    for i in (3, 0, 5, 4, 1, 2):
        states = feed.take(f"s{i}")
        assert states.shape == (10 + i, 4, 16)
        assert torch.equal(states[:, 3, 7], torch.arange(100 * i, 101 * i + 10).float())
    assert not any(is_stored(engine, key) for key in keys)
    stats = feed.stats()
    assert (stats.num_samples, stats.num_retries) == (6, 0)
    assert stats.num_bytes == sum(10 + i for i in range(6)) * 4 * 16 * 4


def test_requests_carry_all_that_an_engine_needs(
    feed: HiddenStateFeed, control: ControlClient, trainer: HiddenStateStore
) -> None:
    feed.submit("first", tokens(7).astype(np.int64))
    request = control.pop_request(LONG_S)
    assert (request.ticket, request.attempt_no, request.reply_to) == ("first", 0, RANK)
    assert request.segment == trainer.segment
    np.testing.assert_array_equal(request.tokens, tokens(7))


def test_memory_is_used_again(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    addresses = set()
    for i in range(20):
        feed.submit(f"s{i}", tokens(100))
        serve(control, engine)
        addresses.add(feed.take(f"s{i}").data_ptr())
    assert len(addresses) == 1


_DYING_ENGINE = """
import sys, time
from tests.services import SECRET, local_endpoints
from tests.transfer.test_feed import put
from tests.transfer.conftest import mooncake_config
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.store import HiddenStateStore

control = ControlClient(sys.argv[1], SECRET, timeout_s=30)
store = HiddenStateStore.open(
    mooncake_config(), local_endpoints("127.0.0.1:1", sys.argv[2]), segment_bytes=0, deadline_s=30
)
print("ready", flush=True)
put(store, control.pop_request(60))
print("put", flush=True)
time.sleep(600)
"""


def test_an_engine_killed_before_its_receipt_costs_one_deadline(
    feed: HiddenStateFeed,
    control: ControlClient,
    engine: HiddenStateStore,
    control_service: Service,
    master: Service,
) -> None:
    command = [sys.executable, "-c", _DYING_ENGINE, control_service.endpoint, master.endpoint]
    dying = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert dying.stdout.readline() == "ready\n"
    feed.submit("s", tokens(12))
    assert dying.stdout.readline() == "put\n"
    dying.kill()
    dying.wait()
    dying.stdout.close()
    again = serve(control, engine)
    assert again.attempt_no == 1
    assert feed.take("s").shape == (12, 4, 16)
    assert feed.stats().num_retries == 1
    orphan = again.key.rpartition("/")[0] + "/0"
    assert again.key != orphan
    assert not is_stored(engine, orphan), "what the dead engine left stays in the segment for ever"


def test_a_request_that_waits_in_the_queue_is_not_sent_twice(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    time.sleep(1.5 * DEADLINE_S)
    assert control.queue_depth() == 1
    serve(control, engine)
    feed.take("s")
    assert control.queue_depth() == 0
    assert feed.stats().num_retries == 0


def test_without_engines_the_last_deadline_names_sample_and_state(
    feed: HiddenStateFeed, control: ControlClient
) -> None:
    feed.submit("lonely", tokens(3))
    start = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"'lonely' \(1 requests; last known: no engine has taken it"
    ):
        feed.take("lonely")
    assert QUEUED_S < time.monotonic() - start < QUEUED_S + 2 * DEADLINE_S
    assert control.queue_depth() == 1


def test_silent_engines_are_asked_max_tries_times(
    feed: HiddenStateFeed, control: ControlClient
) -> None:
    feed.submit("s", tokens(3))
    requests = [control.pop_request(LONG_S) for _ in range(MAX_TRIES)]
    with pytest.raises(DeadlineExceeded, match=r"'s' \(3 requests; .*took it and never answered"):
        feed.take("s")
    assert [request.attempt_no for request in requests] == [0, 1, 2]
    assert len({request.key for request in requests}) == MAX_TRIES
    assert control.pop_request(0.2) is None


def test_a_late_answer_is_used_and_its_duplicate_removed(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    slow = control.pop_request(LONG_S)
    second = control.pop_request(LONG_S)  # asked again
    control.push_reply(RANK, put(engine, slow))
    assert torch.equal(feed.take("s"), states_of(slow))
    control.push_reply(RANK, put(engine, second))
    wait_until(lambda: not is_stored(engine, second.key))
    assert feed.stats().num_samples == 1


def test_a_ticket_may_be_used_again_and_keys_never_are(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    first = serve(control, engine)
    feed.take("s")
    feed.submit("s", tokens(4))
    second = serve(control, engine)
    assert feed.take("s").shape[0] == 4
    assert first.key != second.key


def test_a_lost_object_is_asked_for_again_soon(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    request = control.pop_request(LONG_S)
    receipt = put(engine, request)
    engine.remove(request.key)
    control.push_reply(RANK, receipt)
    assert serve(control, engine, timeout_s=DEADLINE_S / 2).attempt_no == 1
    assert feed.take("s").shape[0] == 3


def test_a_passing_refusal_is_tried_again(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("s", tokens(3))
    request = control.pop_request(LONG_S)
    control.push_reply(RANK, Refusal("s", request.key, "out of memory", permanent=False))
    assert serve(control, engine, timeout_s=DEADLINE_S / 2).attempt_no == 1
    feed.take("s")


def test_passing_refusals_do_not_go_on_for_ever(
    feed: HiddenStateFeed, control: ControlClient
) -> None:
    feed.submit("s", tokens(3))
    for _ in range(MAX_TRIES):
        request = control.pop_request(LONG_S)
        control.push_reply(RANK, Refusal("s", request.key, "out of memory", permanent=False))
    with pytest.raises(DeadlineExceeded, match=r"3 requests; last known: refused: out of memory"):
        feed.take("s")


def test_a_permanent_refusal_is_an_error_of_that_sample_only(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("long", tokens(3))
    feed.submit("fine", tokens(3))
    request = control.pop_request(LONG_S)
    control.push_reply(RANK, Refusal("long", request.key, "9000 tokens, limit 8192", True))
    serve(control, engine)
    with pytest.raises(SampleFailed, match="'long': 9000 tokens, limit 8192"):
        feed.take("long")
    with pytest.raises(ValueError, match="is taken"):
        feed.take("long")
    assert feed.take("fine").shape[0] == 3


@pytest.mark.parametrize("change", [{"shape": (2, 4, 16)}, {"dtype": "int8"}])
def test_states_that_cannot_be_the_samples_are_refused(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore, change: dict
) -> None:
    feed.submit("s", tokens(3))
    request = control.pop_request(LONG_S)
    receipt = put(engine, request)
    fields = {name: getattr(receipt, name) for name in receipt.__struct_fields__}
    control.push_reply(RANK, Receipt(**{**fields, **change}))
    with pytest.raises(SampleFailed, match="'s': engine 2 answered 3 tokens with"):
        feed.take("s")
    assert not is_stored(engine, request.key)


def test_misuse_is_named(feed: HiddenStateFeed) -> None:
    feed.submit("s", tokens(3))
    with pytest.raises(ValueError, match="'s' is open already"):
        feed.submit("s", tokens(3))
    with pytest.raises(ValueError, match="'other' was never submitted"):
        feed.take("other")
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        feed.submit("empty", tokens(0))


def test_a_forged_reply_is_dropped_loudly(
    feed: HiddenStateFeed,
    control_service: Service,
    caplog: pytest.LogCaptureFixture,
) -> None:
    feed.submit("s", tokens(3))
    stranger = ControlClient(control_service.endpoint, bytes(32), timeout_s=5)
    stranger.push_reply(RANK, Refusal("s", "key", "made up", permanent=True))
    stranger.close()
    with pytest.raises(GaveUp):
        feed.take("s", give_up=lambda: "not authentic" in caplog.text)
    feed.submit("t", tokens(3))


def test_a_lost_connection_ends_a_waiting_take(
    connect: Callable[[], ControlClient], trainer: HiddenStateStore
) -> None:
    client = connect()
    feed = HiddenStateFeed(client, trainer, RANK, ControlConfig(), "run.0")
    feed.submit("s", tokens(3))
    threading.Timer(0.2, client.close).start()
    with pytest.raises(ControlLost, match="closed"):
        feed.take("s")
    feed.close()


def test_what_the_target_answers(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    """The request carries how to answer; the states are of prompt and answer."""
    how = Generation(max_tokens=3, temperature=0.5, top_p=0.9, seed=11, stop_token_ids=(2,))
    feed.submit("a", tokens(4), how)
    request = control.pop_request(LONG_S)
    assert request is not None
    assert request.generation == how
    whole = msgspec.structs.replace(request, token_ids=encode_tokens(tokens(6)))
    answer = encode_tokens(tokens(2, first=4))
    control.push_reply(RANK, msgspec.structs.replace(put(engine, whole), answer=answer))
    states, answered = feed.take_with_answer("a")
    assert answered.tolist() == [4, 5]
    assert states[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert not is_stored(engine, request.key)


def test_an_answer_without_its_states(
    feed: HiddenStateFeed, control: ControlClient, engine: HiddenStateStore
) -> None:
    feed.submit("a", tokens(4), Generation(3, 0.0, 1.0, 0, ()))
    request = control.pop_request(LONG_S)
    assert request is not None
    answer = encode_tokens(tokens(2, first=4))
    control.push_reply(RANK, msgspec.structs.replace(put(engine, request), answer=answer))
    with pytest.raises(SampleFailed, match="6 tokens"):
        feed.take("a")
