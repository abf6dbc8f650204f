"""Opening a Mooncake client: its environment, and the guards that setup needs.

Everything known about versions and environment variables of Mooncake is here.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import socket
import time
from typing import Any

from torchspec_hpc.config.endpoints import Endpoints, split_endpoint
from torchspec_hpc.config.transfer_schema import MooncakeConfig
from torchspec_hpc.errors import TorchspecError

logger = logging.getLogger(__name__)

_DISTRIBUTIONS = ("mooncake-transfer-engine", "mooncake-transfer-engine-non-cuda")
#: 0.3.10 took another process on the same host for itself and copied from its addresses
#: (Mooncake issue 1986, fixed by pull request 2001): SIGSEGV unless MC_STORE_MEMCPY=0
_MEMCPY_FIXED = (0, 3, 11)
_PROBE_S = 0.2


class StoreUnavailable(TorchspecError):
    """The Mooncake master does not answer, or this client of it is closed."""


def open_client(
    config: MooncakeConfig, endpoints: Endpoints, segment_bytes: int, deadline_s: float
) -> Any:
    """A ``MooncakeDistributedStore`` that is set up.

    Args:
        config: The run's Mooncake settings.
        endpoints: Where the master is, and by which address others reach this node.
        segment_bytes: Memory this process lends to the store; 0 for a pure client.
        deadline_s: Longest wait for the master.

    Raises:
        StoreUnavailable: The master does not answer, or refuses this client.
    """
    address = endpoints.own_address()
    _set_environment(config, address)
    # setup() itself spends 90 s on a dead master, 4 s with one retry: knock first
    _wait_for_master(endpoints.mooncake_master, deadline_s)
    from mooncake.store import MooncakeDistributedStore  # after the environment is set

    client = MooncakeDistributedStore()
    code = client.setup(
        address,
        "P2PHANDSHAKE",  # no metadata server
        segment_bytes,
        int(config.local_buffer_size),
        config.protocol,
        config.device_name,
        endpoints.mooncake_master,
    )
    if code != 0:
        raise StoreUnavailable(
            f"Mooncake's setup failed with code {code}: master {endpoints.mooncake_master}, "
            f"own address {address}, protocol {config.protocol}, "
            f"segment of {segment_bytes} bytes; its own messages are on stderr"
        )
    return client


def _set_environment(config: MooncakeConfig, address: str) -> None:
    """Mooncake reads these at setup; what the user set stays."""
    settings = {
        "MC_STORE_CLIENT_SETUP_RETRIES": "1",
        "MC_TCP_BIND_ADDRESS": address,  # what peers are told; it listens on all interfaces
        "MC_LOG_LEVEL": "ERROR",  # a put that waits for room warns at every try
    }
    version = _installed_version()
    if config.protocol == "tcp" and version < _MEMCPY_FIXED:
        settings["MC_STORE_MEMCPY"] = "0"
        logger.info(
            "MC_STORE_MEMCPY=0: this Mooncake (%s) crashes with local copies over tcp, "
            "0.3.11 does not and is twice as fast",
            ".".join(map(str, version)),
        )
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _installed_version() -> tuple[int, ...]:
    for name in _DISTRIBUTIONS:
        try:
            text = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
    raise StoreUnavailable(f"Mooncake is not installed: pip install {' or '.join(_DISTRIBUTIONS)}")


def _wait_for_master(endpoint: str, deadline_s: float) -> None:
    deadline = time.monotonic() + deadline_s
    while (reason := _refusal(endpoint, deadline_s)) is not None:
        if time.monotonic() >= deadline:
            raise StoreUnavailable(
                f"the Mooncake master at {endpoint} does not answer for {deadline_s:.0f} s: "
                f"{reason}"
            )
        time.sleep(_PROBE_S)


def _refusal(endpoint: str, timeout_s: float) -> str | None:
    try:
        socket.create_connection(split_endpoint(endpoint), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return None
