"""The client of the control store: queues of requests and replies, heartbeats.

TCPStore facts that shaped this (torch 2.13, each seen on the real server):

- Calls on a connection exclude each other, so a blocking pop would stop every
  other call, and a pop that runs out of time logs two warnings.  We poll; an
  empty pop is one round trip of some 20 us.
- ``set`` and ``queue_push`` do not wait for the server: the first one after its
  death still succeeds.  We follow them with a call that is answered.
- Against a server that is stopped but not gone every answered call blocks for
  ever, the constructor too.  So calls run on a thread of ours that may be
  abandoned.  ``queue_len`` even blocks with the GIL held: it is only sent
  right after another call was answered.
- A popped message is gone if its reader dies.  The requester asks again.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, QueueEmptyError, TCPStore  # type: ignore[attr-defined]

from torchspec_hpc.config.endpoints import split_endpoint
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.transfer.calls import CallsEnded, CallThread
from torchspec_hpc.transfer.messages import (
    Codec,
    Heartbeat,
    Message,
    MessageError,
    Receipt,
    Refusal,
    Request,
    Scalar,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REQUESTS = "requests"
_PUSHED = "requests/pushed"
_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.02
_RECONNECT_POLL_S = 0.1


class ControlLost(TorchspecError):
    """The control store does not answer."""


class ControlClient:
    """One connection to the control store; any number of threads may use it.

    Args:
        endpoint: ``host:port`` of the server.
        secret: The run's secret.
        timeout_s: Longest wait for a connection and for the answer to one call.

    Raises:
        ControlLost: There is no server at ``endpoint``.  Every other method
            raises it too when the server is gone and does not come back in time.
    """

    def __init__(self, endpoint: str, secret: bytes, timeout_s: float) -> None:
        self._endpoint = endpoint
        self._address = split_endpoint(endpoint)
        self._timeout_s = timeout_s
        self._codec = Codec(secret)
        self._lost = ControlLost(f"the client of {endpoint} is closed")
        self._announced: set[str] = set()  # heartbeat registries this connection is in
        self._calls = CallThread("control")
        try:
            self._store: TCPStore = self._bounded(self._connect)
        except ControlLost:
            self.close()
            raise

    def push_request(self, request: Request) -> int:
        """Queues a request.

        Returns:
            Its place: how many requests were ever pushed, this one included.
        """
        wire = self._codec.encode(request)

        def push(store: TCPStore) -> int:
            store.queue_push(_REQUESTS, wire)
            return int(store.add(_PUSHED, 1))

        return self._call(push)

    def pop_request(self, timeout_s: float) -> Request | None:
        """The oldest request, or None if there is none for ``timeout_s`` seconds.

        Raises:
            MessageError: It is not authentic, or no request.
        """
        message = self._pop(_REQUESTS, timeout_s)
        if message is None or isinstance(message, Request):
            return message
        raise _misplaced(message, _REQUESTS)

    def queue_depth(self) -> int:
        """Requests that no engine has taken yet."""

        def depth(store: TCPStore) -> int:
            store.check([_PUSHED])  # answered: so is queue_len, which must not block
            return int(store.queue_len(_REQUESTS))

        return self._call(depth)

    def requests_taken(self) -> int:
        """Requests ever taken by an engine, comparable with :meth:`push_request`'s place.

        May lag by the requests that are being pushed at this moment; exact when
        the queue is empty.
        """

        def taken(store: TCPStore) -> int:
            pushed = int(store.add(_PUSHED, 0))
            return pushed - int(store.queue_len(_REQUESTS))

        return self._call(taken)

    def push_reply(self, rank: int, reply: Receipt | Refusal) -> None:
        """Queues a reply for one trainer rank."""
        key, wire = _replies(rank), self._codec.encode(reply)

        def push(store: TCPStore) -> None:
            store.queue_push(key, wire)
            store.check([key])  # the push itself is not answered

        self._call(push)

    def pop_reply(self, rank: int, timeout_s: float) -> Receipt | Refusal | None:
        """The oldest reply for a trainer rank, or None.

        Raises:
            MessageError: It is not authentic, or no reply.
        """
        message = self._pop(_replies(rank), timeout_s)
        if message is None or isinstance(message, Receipt | Refusal):
            return message
        raise _misplaced(message, _replies(rank))

    def heartbeat(self, role: str, rank: int, payload: Mapping[str, Scalar]) -> None:
        """Says that a process is alive, and how it fares."""
        wire = self._codec.encode(Heartbeat(role, rank, time.time(), dict(payload)))
        key = _heartbeat(role, rank)

        def beat(store: TCPStore) -> None:
            store.set(key, wire)  # type: ignore[arg-type]  # the stub says str, the code bytes
            if key not in self._announced:
                # TCPStore cannot list its keys: a registry per role says which ranks exist
                store.append(_registry(role), f"{rank} ")  # type: ignore[attr-defined]
                self._announced.add(key)
            store.check([key])

        self._call(beat)

    def heartbeats(self, role: str) -> dict[int, dict[str, Any]]:
        """The last heartbeat of every rank of a role that ever sent one.

        Returns:
            Rank -> payload, and in it ``age_s``: seconds since it was sent, by
            the two nodes' clocks.
        """

        def read(store: TCPStore) -> list[bytes]:
            if not store.check([_registry(role)]):  # get would wait for the key
                return []
            ranks = {int(rank) for rank in store.get(_registry(role)).split()}
            return [bytes(store.get(_heartbeat(role, rank))) for rank in sorted(ranks)]

        beats: dict[int, dict[str, Any]] = {}
        for wire in self._call(read):
            beat = self._codec.decode(wire)
            if not isinstance(beat, Heartbeat):
                raise _misplaced(beat, _registry(role))
            beats[beat.rank] = {**beat.payload, "age_s": max(0.0, time.time() - beat.time)}
        return beats

    def close(self) -> None:
        """Ends the connection. Further calls raise :class:`ControlLost`."""
        self._calls.end()

    def _pop(self, key: str, timeout_s: float) -> Message | None:
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while (wire := self._call(lambda store: _try_pop(store, key))) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        return self._codec.decode(wire)

    def _call(self, operation: Callable[[TCPStore], T]) -> T:
        """Runs an operation; on a broken connection once more on a new one."""

        def attempt() -> T:
            try:
                return operation(self._store)
            except DistError as error:
                logger.warning("control store at %s: %s; reconnecting", self._endpoint, error)
                self._store = self._connect()
                return operation(self._store)

        return self._bounded(attempt)

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
        self._announced.clear()
        host, port = self._address
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=self._timeout_s))


def _try_pop(store: TCPStore, key: str) -> bytes | None:
    with contextlib.suppress(QueueEmptyError):
        return bytes(store.queue_pop(key, block=False))
    return None


def _misplaced(message: Message, key: str) -> MessageError:
    return MessageError(f"a {type(message).__name__} does not belong under {key!r}")


def _replies(rank: int) -> str:
    return f"replies/{rank}"


def _heartbeat(role: str, rank: int) -> str:
    return f"heartbeat/{role}/{rank}"


def _registry(role: str) -> str:
    return f"heartbeat/{role}"
