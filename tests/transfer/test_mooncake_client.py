from __future__ import annotations

import importlib.metadata
import logging
import os

import pytest

from torchspec_hpc.config.transfer_schema import MooncakeConfig
from torchspec_hpc.transfer import mooncake_client
from torchspec_hpc.transfer.mooncake_client import StoreUnavailable, _set_environment


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})


def pretend_installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: version)


@pytest.mark.parametrize(
    ("version", "protocol", "expected"),
    [
        ("0.3.10.post2", "tcp", "0"),
        ("0.3.10.post2", "rdma", None),
        ("0.3.11", "tcp", None),
        ("0.3.13.post1", "tcp", None),
        ("0.4.0", "tcp", None),
    ],
)
def test_local_copies_are_off_where_they_crash(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    protocol: str,
    expected: str | None,
) -> None:
    pretend_installed(monkeypatch, version)
    with caplog.at_level(logging.INFO):
        _set_environment(MooncakeConfig(protocol=protocol), "10.0.0.7")
    assert os.environ.get("MC_STORE_MEMCPY") == expected
    assert ("MC_STORE_MEMCPY=0" in caplog.text) == (expected is not None)
    assert os.environ["MC_TCP_BIND_ADDRESS"] == "10.0.0.7"
    assert os.environ["MC_STORE_CLIENT_SETUP_RETRIES"] == "1"


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "0.3.10")
    os.environ["MC_STORE_MEMCPY"] = "1"
    _set_environment(MooncakeConfig(), "10.0.0.7")
    assert os.environ["MC_STORE_MEMCPY"] == "1"


def test_a_missing_mooncake_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_client, "_DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(StoreUnavailable, match="not installed: pip install no-such-distribution"):
        _set_environment(MooncakeConfig(), "10.0.0.7")
