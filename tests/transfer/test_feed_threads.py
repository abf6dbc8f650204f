"""A feed that several streams share: each asks in one thread and takes in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.feed import FeedStats, HiddenStateFeed
from torchspec_hpc.transfer.messages import Receipt
from torchspec_hpc.transfer.store import HiddenStateStore

RANK = 6
STREAMS = ("train", "eval")
NUM_SAMPLES = 150
DEADLINE_S = 60.0


@pytest.fixture
def served_feed(
    connect: Callable[[], ControlClient], trainer: HiddenStateStore, engine: HiddenStateStore
) -> Iterator[HiddenStateFeed]:
    """A feed whose requests an engine answers in a thread of its own."""
    stop, engine_control = threading.Event(), connect()

    def serve() -> None:
        while not stop.is_set():
            if (request := engine_control.pop_request(0.05)) is None:
                continue
            rows = torch.from_numpy(request.tokens.astype(np.float32))
            states = rows[:, None, None].expand(-1, 4, 16).contiguous()
            engine.put(request.key, states, request.segment)
            receipt = Receipt(request.ticket, request.key, tuple(states.shape), "float32", 0)
            engine_control.push_reply(request.reply_to, receipt)

    thread = threading.Thread(target=serve)
    thread.start()
    feed = HiddenStateFeed(connect(), trainer, RANK, ControlConfig(), "threads.0")
    yield feed
    feed.close()
    stop.set()
    thread.join()


def tokens_of(stream: int, sample: int) -> np.ndarray:
    return np.arange(1 + (7 * sample + stream) % 40, dtype=np.int32) + 1000 * stream + sample


def test_streams_do_not_mix(served_feed: HiddenStateFeed) -> None:
    asked = [threading.Semaphore(0) for _ in STREAMS]

    def ask(stream: int) -> None:
        for sample in range(NUM_SAMPLES):
            served_feed.submit(f"{STREAMS[stream]}-{sample}", tokens_of(stream, sample))
            asked[stream].release()

    def take(stream: int) -> int:
        for sample in range(NUM_SAMPLES):
            assert asked[stream].acquire(timeout=DEADLINE_S)
            states = served_feed.take(f"{STREAMS[stream]}-{sample}", give_up=lambda: False)
            tokens = torch.from_numpy(tokens_of(stream, sample)).float()
            assert torch.equal(states, tokens[:, None, None].expand(-1, 4, 16))
        return sample + 1

    def watch() -> FeedStats:
        while (stats := served_feed.stats()).num_samples < len(STREAMS) * NUM_SAMPLES:
            time.sleep(0.001)
        return stats

    with ThreadPoolExecutor(2 * len(STREAMS) + 1) as threads:
        calls = [threads.submit(run, i) for i in range(len(STREAMS)) for run in (ask, take)]
        stats = threads.submit(watch)
        assert [call.result(DEADLINE_S) for call in calls] == [None, NUM_SAMPLES] * len(STREAMS)
        assert stats.result(DEADLINE_S).num_retries == 0


def test_a_connection_answers_each_thread_its_own(connect: Callable[[], ControlClient]) -> None:
    client = connect()
    barrier = threading.Barrier(4)

    def beat(rank: int) -> list[int]:
        barrier.wait()
        seen = []
        for count in range(100):
            client.heartbeat("threads", rank, {"count": count})
            seen.append(client.heartbeats("threads")[rank]["count"])
        return seen

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(beat, range(4))) == [list(range(100))] * 4
