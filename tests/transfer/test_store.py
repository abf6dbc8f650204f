from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from tests.helpers import free_port
from tests.services import Service, mooncake_master
from tests.transfer.conftest import MiB, mooncake_config, open_store
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.transfer.store import (
    HiddenStateStore,
    ObjectGone,
    StoreFull,
    StoreUnavailable,
)

# Mooncake alone: an owner of a segment that can be killed, and starts without torch
_OWNER = """
import sys, time
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
assert store.setup("127.0.0.1", "P2PHANDSHAKE", 32 << 20, 16 << 20, "tcp", "", sys.argv[1]) == 0
print(store.get_hostname(), flush=True)
time.sleep(600)
"""


@contextmanager
def segment_owner(master: Service) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, master.endpoint],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def states(num_mib: float = 1, value: float = 1.0) -> torch.Tensor:
    """[T, 4, 64] float32; a token is 1 KiB."""
    return torch.full((int(num_mib * 1024), 4, 64), value, dtype=torch.float32)


def in_segment(store: HiddenStateStore, key: str) -> str:
    """Name of the segment that holds an object."""
    [replica] = store._client.get_replica_desc(key)
    return replica.get_memory_descriptor().buffer_descriptor.transport_endpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_put_is_read_bit_by_bit(
    trainer: HiddenStateStore, engine: HiddenStateStore, dtype: torch.dtype
) -> None:
    sent = torch.randn(37, 4, 576).to(dtype)
    engine.put("bits", sent, trainer.segment)
    received = torch.empty_like(sent)
    trainer.get_into("bits", received)
    assert torch.equal(received.view(torch.uint8), sent.view(torch.uint8))


def test_a_removed_object_is_gone_and_may_be_removed_again(trainer: HiddenStateStore) -> None:
    trainer.put("once", states(), trainer.segment)
    trainer.get_into("once", states())  # takes a lease
    trainer.remove("once")
    with pytest.raises(ObjectGone, match=r"'once'.*no such object.*-704"):
        trainer.get_into("once", states())
    trainer.remove("once")


def test_a_known_key_keeps_its_first_value(trainer: HiddenStateStore) -> None:
    trainer.put("twice", states(value=1), trainer.segment)
    trainer.put("twice", states(value=2), trainer.segment)
    read = states(value=0)
    trainer.get_into("twice", read)
    assert torch.equal(read, states(value=1))


def test_a_buffer_of_another_size_is_never_half_filled(trainer: HiddenStateStore) -> None:
    trainer.put("sized", states(1), trainer.segment)
    with pytest.raises(ObjectGone, match=f"{MiB} bytes came, {2 * MiB} were expected"):
        trainer.get_into("sized", states(2))
    with pytest.raises(ObjectGone, match=f"more than the expected {MiB // 2} bytes"):
        trainer.get_into("sized", states(0.5))


@pytest.mark.parametrize(
    "tensor", [torch.empty(0, 4, 64), torch.zeros(8, 64, 4).transpose(1, 2)], ids=["empty", "view"]
)
def test_memory_that_cannot_be_sent_is_refused(
    trainer: HiddenStateStore, tensor: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="contiguous and not empty"):
        trainer.put("bad", tensor, "")


def test_objects_go_to_the_preferred_segment_and_spill_over(
    master: Service, trainer: HiddenStateStore, engine: HiddenStateStore
) -> None:
    second = open_store(master, 32)
    for i in range(12):
        engine.put(f"near{i}", states(4), second.segment)
    homes = [in_segment(engine, f"near{i}") for i in range(12)]
    assert len(set(homes[:8])) == 1
    assert len(set(homes)) == 2
    assert homes[8:] == [homes[8]] * 4
    second.close()
    with pytest.raises(ObjectGone):  # it was in the second's segment
        trainer.get_into("near0", states(4))
    trainer.get_into("near11", states(4))


def test_an_unknown_preferred_segment_is_no_obstacle(trainer: HiddenStateStore) -> None:
    trainer.put("anywhere", states(), "127.0.0.1:1")
    trainer.get_into("anywhere", states())


def test_unread_objects_survive_pressure(
    trainer: HiddenStateStore, engine: HiddenStateStore
) -> None:
    """Without the hard pin the master drops unread objects above 90 % use, and says nothing."""
    impatient = HiddenStateStore(engine._client, mooncake_config(put_deadline_s=0.5))
    for i in range(8):
        engine.put(f"pinned{i}", states(4, value=i), trainer.segment)
        time.sleep(0.05)
    with pytest.raises(StoreFull, match=f"global_segment_size is {32 * MiB}"):
        impatient.put("one too many", states(4), trainer.segment)
    time.sleep(1)
    read = states(4)
    for i in range(8):
        trainer.get_into(f"pinned{i}", read)
        assert torch.equal(read, states(4, value=i))


def test_a_put_into_a_full_store_waits_for_room(
    trainer: HiddenStateStore, engine: HiddenStateStore
) -> None:
    for i in range(8):
        engine.put(f"full{i}", states(4), trainer.segment)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.put, "waited", states(4, value=7), trainer.segment)
        time.sleep(0.5)
        assert not waiting.done()
        trainer.remove("full3")
        waiting.result(5)
    read = states(4)
    trainer.get_into("waited", read)
    assert torch.equal(read, states(4, value=7))


def test_a_sample_larger_than_a_segment_names_both_sizes(trainer: HiddenStateStore) -> None:
    with pytest.raises(ConfigError, match=f"take {33 * MiB} bytes") as caught:
        trainer.put("huge", states(33), trainer.segment)
    assert f"mooncake.global_segment_size is {32 * MiB}" in str(caught.value)
    assert "raise mooncake.global_segment_size or lower training.max_seq_length" in str(
        caught.value
    )


def test_objects_die_with_their_owner_and_that_is_noticed_fast() -> None:
    with mooncake_master() as own_master, segment_owner(own_master) as (owner, segment):
        engine = open_store(own_master)
        engine.put("orphan", states(), segment)
        owner.kill()
        owner.wait()
        start = time.monotonic()
        with pytest.raises(ObjectGone, match=r"process that holds the segment is gone.*-800"):
            engine.get_into("orphan", states())
        with pytest.raises(ObjectGone, match="process that holds the segment is gone"):
            engine.put("unborn", states(), segment)
        engine.remove("orphan")
        assert time.monotonic() - start < 10
        engine.close()


def test_a_master_that_is_not_there_is_noticed_fast() -> None:
    nobody = Service(f"127.0.0.1:{free_port()}", process=None)
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=f"{nobody.endpoint} does not answer for 1 s"):
        open_store(nobody, deadline_s=1)
    assert time.monotonic() - start < 4


def test_a_dead_master_is_noticed_and_its_successor_is_used() -> None:
    port = free_port()
    with mooncake_master(port=port) as own_master:
        trainer = open_store(own_master, 32)
        trainer.put("old", states(), trainer.segment)
        own_master.process.send_signal(signal.SIGKILL)
        own_master.process.wait()
        start = time.monotonic()
        with pytest.raises(StoreUnavailable, match="master does not answer"):
            trainer.put("lost", states(), trainer.segment)
        with pytest.raises(StoreUnavailable, match="master does not answer"):
            trainer.get_into("old", states())
        assert time.monotonic() - start < 10
    with mooncake_master(port=port):
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                trainer.put("new", states(), trainer.segment)
                break
            except (StoreUnavailable, StoreFull):
                time.sleep(0.2)
        trainer.get_into("new", states())
        trainer.close()


def test_a_closed_store_raises_instead_of_crashing(master: Service) -> None:
    store = open_store(master, 32)
    store.close()
    store.close()
    for call in (
        lambda: store.put("k", states(), ""),
        lambda: store.get_into("k", states()),
        lambda: store.remove("k"),
        lambda: store.register(states()),
        lambda: store.segment,
    ):
        with pytest.raises(StoreUnavailable, match="closed"):
            call()


def test_closing_while_threads_put_and_wait_is_safe(
    master: Service, trainer: HiddenStateStore
) -> None:
    engine = open_store(master)
    started = threading.Barrier(5)

    def fill(thread: int) -> int:
        started.wait()
        for i in range(10_000):
            engine.put(f"fill/{thread}/{i}", states(1), trainer.segment)
        return 10_000

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(fill, thread) for thread in range(4)]
        started.wait()
        time.sleep(0.3)
        engine.close()
        for result in running:
            with pytest.raises(StoreUnavailable, match="closed"):
                result.result(10)


def test_many_threads_write_and_read_at_once(
    trainer: HiddenStateStore, engine: HiddenStateStore
) -> None:

    def write(thread: int) -> None:
        for i in range(40):
            engine.put(f"many/{thread}/{i}", states(1, value=thread * 100 + i), trainer.segment)

    def read(thread: int) -> int:
        num_right, buffer = 0, states(1)
        for i in range(40):
            while True:
                try:
                    trainer.get_into(f"many/{thread}/{i}", buffer)
                    break
                except ObjectGone:
                    time.sleep(0.002)
            num_right += bool((buffer == thread * 100 + i).all())
            trainer.remove(f"many/{thread}/{i}")
        return num_right

    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write, thread) for thread in range(3)]
        readers = [pool.submit(read, thread) for thread in range(3)]
        assert [reader.result(60) for reader in readers] == [40] * 3
        for writer in writers:
            writer.result()
