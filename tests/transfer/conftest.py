"""One Mooncake master and one control store for all tests that do not break them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # no C++ backtraces where connections must break

from tests.services import SECRET, Service, control_server, local_endpoints, mooncake_master
from torchspec_hpc.config.transfer_schema import MooncakeConfig
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.store import HiddenStateStore

MiB = 1024**2


@pytest.fixture(scope="session")
def control_service() -> Iterator[Service]:
    with control_server() as service:
        yield service


@pytest.fixture(scope="session")
def master() -> Iterator[Service]:
    with mooncake_master() as service:
        yield service


@pytest.fixture
def connect(control_service: Service) -> Iterator[Callable[[], ControlClient]]:
    """Opens clients of a control store whose queue of requests is empty."""
    clients = []

    def connect() -> ControlClient:
        clients.append(ControlClient(control_service.endpoint, SECRET, timeout_s=5))
        return clients[-1]

    client = connect()
    while client.pop_request(0):
        pass
    yield connect
    for client in clients:
        client.close()


@pytest.fixture(scope="session")
def open_stores(master: Service) -> Iterator[tuple[HiddenStateStore, HiddenStateStore]]:
    with ExitStack() as stack:
        pair = open_store(master, 32), open_store(master)
        for store in pair:
            stack.callback(store.close)
        yield pair


@pytest.fixture
def trainer(open_stores: tuple[HiddenStateStore, HiddenStateStore]) -> Iterator[HiddenStateStore]:
    """A trainer's store with an empty segment of 32 MiB; closing one takes a second."""
    yield open_stores[0]
    open_stores[0]._client.remove_all(True)


@pytest.fixture
def engine(open_stores: tuple[HiddenStateStore, HiddenStateStore]) -> HiddenStateStore:
    """An engine's store: no segment of its own."""
    return open_stores[1]


def open_store(master: Service, segment_mib: int = 0, deadline_s: float = 5.0) -> HiddenStateStore:
    return HiddenStateStore.open(
        mooncake_config(),
        local_endpoints("127.0.0.1:1", master.endpoint),
        segment_bytes=segment_mib * MiB,
        deadline_s=deadline_s,
    )


def mooncake_config(put_deadline_s: float = 20.0) -> MooncakeConfig:
    return MooncakeConfig(
        global_segment_size=32 * MiB,
        local_buffer_size=16 * MiB,
        put_deadline_s=put_deadline_s,
        checksum=True,
    )
