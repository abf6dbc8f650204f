"""The client of the control store: queues of requests and replies, heartbeats.

We poll: an empty pop is one round trip of some 20 us, and a blocking one would stop
every other call of the connection.  Calls that the server does not answer are followed by
one that it does.  A popped message is gone if its reader dies; the requester asks again.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch.distributed import QueueEmptyError, TCPStore  # type: ignore[attr-defined]

from torchspec_hpc.transfer.connection import Connection, ControlLost
from torchspec_hpc.transfer.messages import (
    Codec,
    Heartbeat,
    MessageError,
    Receipt,
    Refusal,
    Request,
    Scalar,
    Taken,
)

__all__ = ["ControlClient", "ControlLost"]

M = TypeVar("M")

_REQUESTS = "requests"
_PUSHED = "requests/pushed"
_FIRST_POLL_S = 0.001
_LAST_POLL_S = 0.02


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
        self._codec = Codec(secret)
        self._announced: set[str] = set()  # heartbeat registries this connection is in
        self._session = secrets.token_hex(4)
        self._rank: int | None = None  # of the engine whose heartbeats are sent from here
        self._connection = Connection(endpoint, timeout_s, on_connect=self._announced.clear)
        self._call = self._connection.call

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

        Where heartbeats of an engine are sent over this connection, the requester learns
        that this engine has it.

        Raises:
            MessageError: It is not authentic, or no request.
        """
        return self._poll(self._take_request, timeout_s)

    def _take_request(self, store: TCPStore) -> Request | None:
        wire = _try_pop(store, _REQUESTS)
        if wire is None:
            return None
        request = self._decode(_REQUESTS, wire, Request)
        if self._rank is not None:  # at once: a moment later we may be dead
            taken = self._codec.encode(Taken(request.key, self._rank, self._session))
            store.queue_push(_taken(request.reply_to), taken)
        return request

    def pop_taken(self, rank: int) -> list[Taken]:
        """Which requests of a trainer rank engines have taken since the last call.

        Raises:
            MessageError: One is not authentic, or says something else.
        """
        key = _taken(rank)

        def drain(store: TCPStore) -> list[bytes]:
            return list(iter(lambda: _try_pop(store, key), None))

        return [self._decode(key, wire, Taken) for wire in self._call(drain)]

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
        key = _replies(rank)
        wire = self._poll(lambda store: _try_pop(store, key), timeout_s)
        if wire is None:
            return None
        return cast("Receipt | Refusal", self._decode(key, wire, (Receipt, Refusal)))

    def heartbeat(self, role: str, rank: int, payload: Mapping[str, Scalar]) -> None:
        """Says that a process is alive, and how it fares."""
        wire = self._codec.encode(Heartbeat(role, rank, time.time(), self._session, dict(payload)))
        key = _heartbeat(role, rank)
        if role == "inference":
            self._rank = rank

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

        def ranks(store: TCPStore) -> set[int]:
            if not store.check([_registry(role)]):  # get would wait for the key
                return set()
            return {int(rank) for rank in store.get(_registry(role)).split()}

        now = time.time()
        return {
            beat.rank: {**beat.payload, "age_s": max(0.0, now - beat.time)}
            for beat in self.last_beats(role, sorted(self._call(ranks)))
        }

    def last_beats(self, role: str, ranks: Sequence[int]) -> list[Heartbeat]:
        """The last heartbeat of each of these ranks, which have all sent one."""

        def read(store: TCPStore) -> list[bytes]:
            return [bytes(store.get(_heartbeat(role, rank))) for rank in ranks]

        return [self._decode(_registry(role), wire, Heartbeat) for wire in self._call(read)]

    def close(self) -> None:
        """Ends the connection. Further calls raise :class:`ControlLost`."""
        self._connection.close()

    def _poll(self, attempt: Callable[[TCPStore], M | None], timeout_s: float) -> M | None:
        """Repeats a call until it finds something, with growing pauses."""
        deadline = time.monotonic() + timeout_s
        pause_s = _FIRST_POLL_S
        while (found := self._call(attempt)) is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            time.sleep(min(pause_s, left_s))
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        return found

    def _decode(self, key: str, wire: bytes, kind: type[M] | tuple[type[M], ...]) -> M:
        message = self._codec.decode(wire)
        if isinstance(message, kind):
            return message
        raise MessageError(f"a {type(message).__name__} does not belong under {key!r}")


def _try_pop(store: TCPStore, key: str) -> bytes | None:
    with contextlib.suppress(QueueEmptyError):
        return bytes(store.queue_pop(key, block=False))
    return None


def _replies(rank: int) -> str:
    return f"replies/{rank}"


def _taken(rank: int) -> str:
    return f"taken/{rank}"


def _heartbeat(role: str, rank: int) -> str:
    return f"heartbeat/{role}/{rank}"


def _registry(role: str) -> str:
    return f"heartbeat/{role}"
