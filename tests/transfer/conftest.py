"""One Mooncake master and one control store for all tests that do not break them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # no C++ backtraces where connections must break

from tests.services import SECRET, Service, control_server, local_endpoints, mooncake_master
from torchspec_hpc.config.schema import MooncakeConfig
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.store import HiddenStateStore

MiB = 1024**2
OpenStore = Callable[..., HiddenStateStore]


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


@pytest.fixture
def open_store(master: Service) -> Iterator[OpenStore]:
    """Opens stores that are closed after the test."""
    with ExitStack() as stack:

        def open_store(
            segment_mib: int = 0, *, endpoint: str = master.endpoint, **settings: float
        ) -> HiddenStateStore:
            store = HiddenStateStore.open(
                mooncake_config(**settings),
                local_endpoints("127.0.0.1:1", endpoint),
                segment_bytes=segment_mib * MiB,
                deadline_s=5,
            )
            stack.callback(store.close)
            return store

        yield open_store


def mooncake_config(**settings: float) -> MooncakeConfig:
    defaults = {"global_segment_size": 32 * MiB, "local_buffer_size": 16 * MiB}
    return MooncakeConfig(**{**defaults, **settings})
