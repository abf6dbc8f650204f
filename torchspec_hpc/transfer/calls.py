"""A thread for calls that may never return."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class CallsEnded(Exception):
    """The thread takes no more calls."""


class CallThread:
    """Runs calls one at a time, each for any thread that waits no longer than it likes.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = (
            queue.SimpleQueue()
        )
        self._ended = False
        self._gate = threading.Lock()  # no call comes after the None that ends the thread
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def run(self, call: Callable[[], T], timeout_s: float) -> T:
        """Runs a call after those that came before.

        Returns:
            What it returns; what it raises is raised here.

        Raises:
            CallsEnded: :meth:`end` was called before.
            concurrent.futures.TimeoutError: It has not returned in time.  It still
                runs, and so will the thread until it returns.
        """
        future: Future[T] = Future()
        with self._gate:
            if self._ended:
                raise CallsEnded
            self._calls.put((future, call))
        return future.result(timeout_s)

    def end(self) -> None:
        """Ends the thread after the calls that wait."""
        with self._gate:
            if not self._ended:
                self._ended = True
                self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except Exception as error:  # noqa: BLE001 - raised again where it is waited for
                future.set_exception(error)
