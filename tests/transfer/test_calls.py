from __future__ import annotations

import threading
import time
from concurrent.futures import TimeoutError as FutureTimeoutError

import pytest

from torchspec_hpc.transfer.calls import CallsEnded, CallThread


def test_results_and_errors_come_back() -> None:
    calls = CallThread("test")
    assert calls.run(lambda: 7, timeout_s=5) == 7
    with pytest.raises(KeyError, match="missing"):
        calls.run(lambda: {}["missing"], timeout_s=5)
    calls.end()


def test_a_call_that_hangs_is_left_behind() -> None:
    calls, released = CallThread("test"), threading.Event()
    start = time.monotonic()
    with pytest.raises(FutureTimeoutError):
        calls.run(released.wait, timeout_s=0.1)
    assert time.monotonic() - start < 2
    released.set()
    assert calls.run(lambda: "goes on", timeout_s=5) == "goes on"
    calls.end()


def test_nothing_runs_after_the_end() -> None:
    calls = CallThread("test")
    calls.end()
    calls.end()
    with pytest.raises(CallsEnded):
        calls.run(lambda: 7, timeout_s=5)
