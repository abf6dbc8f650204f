from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import pytest

from torchspec_hpc.config.endpoints import (
    Endpoints,
    create_secret,
    join_endpoint,
    node_name,
    read_secret,
    split_endpoint,
)
from torchspec_hpc.config.interfaces import interface_address
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError, UserError

ENDPOINTS = Endpoints("demo-0a1b2c3d", 2, "10.0.0.1:7000", "10.0.0.1:7001", {"n1": "10.0.0.1"})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def test_written_endpoints_are_read_back(run: RunDir) -> None:
    ENDPOINTS.write(run)
    assert Endpoints.read(run, deadline_s=0) == ENDPOINTS
    assert ENDPOINTS.attempt_id == "demo-0a1b2c3d.2"


def test_read_waits_until_they_are_published(run: RunDir) -> None:
    threading.Timer(0.3, ENDPOINTS.write, [run]).start()
    assert Endpoints.read(run, deadline_s=10) == ENDPOINTS


def test_read_gives_up_at_the_deadline_and_names_the_file(run: RunDir) -> None:
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=str(run.endpoints)):
        Endpoints.read(run, deadline_s=0.2)
    assert time.monotonic() - start < 2


def test_own_address_is_the_one_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert node_name() == "n1"
    assert ENDPOINTS.own_address() == "10.0.0.1"


def test_a_node_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n9")
    with pytest.raises(TorchspecError, match=r"node 'n9' .* \['n1'\]"):
        ENDPOINTS.own_address()


def test_secret_is_private_and_the_same_in_every_attempt(run: RunDir) -> None:
    secret = create_secret(run)
    assert len(secret) == 32
    assert create_secret(run) == read_secret(run) == secret
    assert stat.S_IMODE(run.secret.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("endpoint", "pair"),
    [("node1:80", ("node1", 80)), ("10.0.0.1:1", ("10.0.0.1", 1)), ("[fe80::1]:9", ("fe80::1", 9))],
)
def test_split_endpoint(endpoint: str, pair: tuple[str, int]) -> None:
    assert split_endpoint(endpoint) == pair


@pytest.mark.parametrize("endpoint", ["node1", ":80", "node1:", "node1:http", ""])
def test_split_endpoint_refuses(endpoint: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        split_endpoint(endpoint)


def test_an_interface_has_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface_address("lo") == "127.0.0.1"
    monkeypatch.setenv("TORCHSPEC_INTERFACE", "lo")
    assert Endpoints("r", 0, "h:1", "h:2", {}).own_address() == "127.0.0.1"
    with pytest.raises(UserError, match=r"network_interface = ib7: .*\n  allowed: lo, "):
        interface_address("ib7")


def test_ipv6_endpoints() -> None:
    assert split_endpoint(join_endpoint("fd00::2", 80)) == ("fd00::2", 80)
    assert join_endpoint("n1", 80) == "n1:80"
