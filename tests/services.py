"""The real Mooncake master and control store, each its own process, for any test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import free_port
from torchspec_hpc.config.endpoints import Endpoints, node_name

SECRET = bytes(range(32))


@dataclass
class Service:
    """A running server: its ``host:port`` and its process."""

    endpoint: str
    process: subprocess.Popen[str]


@contextmanager
def mooncake_master(*flags: str, port: int | None = None) -> Iterator[Service]:
    """A Mooncake master on the loopback interface; `flags` are added to its command line."""
    port = port or free_port()
    command = [
        str(Path(sys.executable).with_name("mooncake_master")),
        "--rpc_address=127.0.0.1",
        f"--rpc_port={port}",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={free_port()}",
        "--default_kv_lease_ttl=500",
        *flags,
    ]
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_listening(process, port)
        yield Service(f"127.0.0.1:{port}", process)
    finally:
        _stop(process)


@contextmanager
def control_server(port: int = 0) -> Iterator[Service]:
    """A control store on the loopback interface."""
    command = [sys.executable, "-m", "torchspec_hpc.transfer.control_server"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        text=True,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},
    )
    try:
        ready, endpoint = process.stdout.readline().split()
        assert ready == "READY"
        yield Service(endpoint, process)
    finally:
        _stop(process)


def local_endpoints(control: str, master: str, run_id: str = "test-00000000") -> Endpoints:
    """The endpoints file of a run on this machine."""
    return Endpoints(run_id, 0, control, master, {node_name(): "127.0.0.1"})


def _wait_listening(process: subprocess.Popen[str], port: int, deadline_s: float = 20.0) -> None:
    start = time.monotonic()
    while time.monotonic() - start < deadline_s:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise AssertionError(f"{process.args} does not listen after {deadline_s} s")


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
