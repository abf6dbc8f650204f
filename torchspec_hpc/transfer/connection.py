"""A connection to the control store that mends itself and never blocks for ever.

TCPStore facts that shaped this (torch 2.13, each seen on the real server):

- Calls on a connection exclude each other, so a blocking pop would stop every
  other call, and a pop that runs out of time logs two warnings.
- ``set`` and ``queue_push`` do not wait for the server: the first one after its
  death still succeeds.
- Against a server that is stopped but not gone every answered call blocks for
  ever, the constructor too.  So calls run on a thread of ours that may be
  abandoned.  ``queue_len`` even blocks with the GIL held: it is only to be sent
  right after another call was answered.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import TypeVar

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # not in __all__

from torchspec_hpc.config.endpoints import split_endpoint
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.transfer.calls import CallsEnded, CallThread

logger = logging.getLogger(__name__)
T = TypeVar("T")

_RECONNECT_POLL_S = 0.1


class ControlLost(TorchspecError):
    """The control store does not answer."""


class Connection:
    """Runs operations on a TCPStore, for any number of threads.

    Args:
        endpoint: ``host:port`` of the server.
        timeout_s: Longest wait for a connection and for the answer to one call.
        on_connect: Called before each connection, also after an old one broke.

    Raises:
        ControlLost: There is no server at ``endpoint``.
    """

    def __init__(self, endpoint: str, timeout_s: float, on_connect: Callable[[], None]) -> None:
        self._endpoint, self._address = endpoint, split_endpoint(endpoint)
        self._timeout_s, self._on_connect = timeout_s, on_connect
        self._lost = ControlLost(f"the client of {endpoint} is closed")
        self._calls = CallThread("control")
        try:
            self._store: TCPStore = self._bounded(self._connect)
        except ControlLost:
            self.close()
            raise

    def call(self, operation: Callable[[TCPStore], T]) -> T:
        """Runs an operation; on a broken connection once more on a new one.

        Raises:
            ControlLost: The server is gone and does not come back in time, or :meth:`close`
                was called.
        """

        def attempt() -> T:
            try:
                return operation(self._store)
            except DistError as error:
                logger.warning("control store at %s: %s; reconnecting", self._endpoint, error)
                self._store = self._connect()
                return operation(self._store)

        return self._bounded(attempt)

    def close(self) -> None:
        """Ends the connection."""
        self._calls.end()

    def _bounded(self, job: Callable[[], T]) -> T:
        limit_s = 2 * self._timeout_s  # a job may first reconnect, then call
        try:
            return self._calls.run(job, limit_s)
        except CallsEnded:
            raise self._lost from None
        except FutureTimeoutError:
            reason = f"no answer for {limit_s:.0f} s"
        except DistError as error:
            reason = str(error)
        self._lost = ControlLost(f"the control store at {self._endpoint} is lost: {reason}")
        self._calls.end()
        raise self._lost

    def _connect(self) -> TCPStore:
        # TCPStore's own retries print a C++ backtrace each: knock first
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                socket.create_connection(self._address, timeout=self._timeout_s).close()
                break
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise ControlLost(
                        f"the control store at {self._endpoint} cannot be reached "
                        f"for {self._timeout_s:.0f} s: {error}"
                    ) from None
            time.sleep(_RECONNECT_POLL_S)
        self._on_connect()
        host, port = self._address
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._timeout_s))
