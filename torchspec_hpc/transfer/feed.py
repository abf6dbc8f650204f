"""The trainer's side of the stream: ask for samples, take their hidden states.

A background thread receives the replies, reads each object into reused memory,
removes it from the store, and asks again whenever something was lost.  One rule
heals every fault: a request without states after its deadline is sent again
under a new key.  Whatever arrives twice is removed, and delivered once.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.holders import Holders
from torchspec_hpc.transfer.messages import (
    TOKEN_BYTES,
    Generation,
    MessageError,
    Receipt,
    Refusal,
    Request,
    decode_tokens,
    encode_tokens,
)
from torchspec_hpc.transfer.reader import Reader, WrongStates
from torchspec_hpc.transfer.store import HiddenStateStore, ObjectGone
from torchspec_hpc.transfer.ticket import Ticket

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_ASK_S = 0.5  # between questions to `give_up`, which may look at a shared file system
_CLOSE_S = 60.0  # the longest call under way: Mooncake gives up after 30 s


class GaveUp(TorchspecError):
    """The trainer was asked to stop while it waited for a sample."""


class SampleFailed(TorchspecError):
    """The engines cannot serve a sample, and asking again would not help."""


@dataclass
class FeedStats:
    """Totals since the feed was opened.

    Attributes:
        num_samples: Taken by the trainer.
        num_bytes: Read from the store.
        num_retries: Requests sent again.
    """

    num_samples: int = 0
    num_bytes: int = 0
    num_retries: int = 0


class HiddenStateFeed:
    """Asks for samples and hands out their hidden states, in any order.

    How many samples are open at a time is up to the caller; their hidden states
    all fit in memory at once, or should not be asked for.

    Args:
        control: Connection to the control store.
        store: This rank's client, with its own segment.
        rank: Of this trainer: where replies go.
        control_config: Deadlines and tries.
        run_id_attempt: ``Endpoints.attempt_id``; begins every key.
    """

    def __init__(
        self,
        control: ControlClient,
        store: HiddenStateStore,
        rank: int,
        control_config: ControlConfig,
        run_id_attempt: str,
    ) -> None:
        self._control = control
        self._store = store
        self._rank = rank
        self._deadline_s = control_config.request_deadline_s
        self._max_tries = control_config.request_max_tries
        # the supervisor, which knows whether there are engines, has its say before
        engines_s = max(control_config.engine_ready_s, control_config.engines_lost_s)
        self._queued_limit_s = engines_s + self._deadline_s
        self._holders = Holders(control, rank, control_config.heartbeat_s)
        self._key_prefix = f"{run_id_attempt}/{rank}"
        self._serial = itertools.count()
        self._segment = store.segment
        self._reader = Reader(store)
        self._leftovers: deque[tuple[float, str]] = deque()  # when to remove which key again
        self._stats = FeedStats()
        self._tickets: dict[str, Ticket] = {}
        self._changed = threading.Condition()  # guards all that both threads write
        self._crash: Exception | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def submit(
        self,
        ticket: str,
        token_ids: npt.NDArray[np.integer],
        generation: Generation | None = None,
    ) -> None:
        """Asks for the hidden states of a sample.

        Args:
            ticket: Names the sample; unique among those not yet taken.
            token_ids: [T], not empty.
            generation: How the target answers first; the states are those of its answer, too.
        """
        if token_ids.ndim != 1 or token_ids.size == 0:
            raise ValueError(f"token_ids of {ticket!r} have shape {token_ids.shape}; allowed: [T]")
        entry = Ticket(ticket, encode_tokens(token_ids), generation)
        with self._changed:
            if self._crash is not None:
                raise self._crash
            if ticket in self._tickets:
                raise ValueError(f"ticket {ticket!r} is open already")
            self._tickets[ticket] = entry
            self._send(entry)

    def take(self, ticket: str, give_up: Callable[[], bool] | None = None) -> torch.Tensor:
        """The hidden states of a submitted sample; see :meth:`take_with_answer`."""
        return self.take_with_answer(ticket, give_up)[0]

    def take_with_answer(
        self, ticket: str, give_up: Callable[[], bool] | None = None
    ) -> tuple[torch.Tensor, npt.NDArray[np.int32]]:
        """Waits for the hidden states of a submitted sample, and what the target answered.

        Args:
            ticket: As submitted.
            give_up: Asked now and then while there is nothing to take; True ends the wait.

        Returns:
            Tensor [T, A + 1, H] in the engine's type, and the last of its T tokens, those
            that were generated.  The tensor is the caller's as long as a reference to it, or
            to a view of it, exists; then its memory is used again.  Do not start an
            asynchronous copy and drop the tensor.

        Raises:
            GaveUp: `give_up` said so. The ticket stays open.
            SampleFailed: No engine can serve it.
            DeadlineExceeded: ``request_max_tries`` requests were not answered, or no
                engine took the request for longer than the run does without engines.
            ControlLost: The control store is gone.
            StoreUnavailable: The Mooncake master is gone.
        """
        start = time.monotonic()
        # the thread settles every ticket before that, unless it hangs itself
        limit_s = self._queued_limit_s + self._deadline_s * (self._max_tries + 1)
        with self._changed:
            entry = self._tickets.get(ticket)
            if entry is None:
                raise ValueError(f"ticket {ticket!r} was never submitted, or is taken")
            while not self._changed.wait_for(lambda: entry.settled or self._crash, _ASK_S):
                if time.monotonic() - start > limit_s:
                    break
                if give_up is not None and self._unlocked(give_up):
                    raise GaveUp(f"gave up waiting for sample {ticket!r}: {entry.status}")
            if not entry.settled:
                raise self._crash or entry.too_late()
            del self._tickets[ticket]
            if entry.error is not None:
                raise entry.error
            assert entry.states is not None
            self._stats.num_samples += 1
            return entry.states, decode_tokens(entry.answer)

    def _unlocked(self, question: Callable[[], bool]) -> bool:
        """Asks without the lock: a slow file system must not hold up the background thread."""
        self._changed.release()
        try:
            return question()
        finally:
            self._changed.acquire()

    def stats(self) -> FeedStats:
        """Totals so far."""
        with self._changed:
            return replace(self._stats)

    def close(self) -> None:
        """Stops the background thread. Open tickets are given up."""
        self._closing.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            logger.warning("the feed's thread hangs in a call; it is left behind")

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                if (reply := self._pop()) is not None:
                    self._receive(reply)
                self._check_holders()
                self._check_deadlines()
                self._remove_leftovers()
        except Exception as error:  # noqa: BLE001 - raised again by every take and submit
            logger.error("the feed of trainer rank %d stopped: %s", self._rank, error)
            with self._changed:
                self._crash = error
                self._changed.notify_all()

    def _pop(self) -> Receipt | Refusal | None:
        try:
            return self._control.pop_reply(self._rank, _POLL_S)
        except MessageError as error:  # whoever pushed it is no engine of ours
            logger.error("dropped a reply: %s", error)
            return None

    def _receive(self, reply: Receipt | Refusal) -> None:
        with self._changed:
            entry = self._tickets.get(reply.ticket)
        wanted = entry is not None and not entry.settled and reply.key in entry.keys
        if entry is None or not wanted:
            if isinstance(reply, Receipt):
                self._store.remove(reply.key)
        elif isinstance(reply, Receipt):
            self._fetch(entry, reply)
        elif reply.permanent:
            self._settle(entry, error=SampleFailed(f"sample {entry.name!r}: {reply.reason}"))
        elif reply.key == entry.keys[-1]:
            entry.postpone(f"refused: {reply.reason}", self._deadline_s)

    def _fetch(self, entry: Ticket, receipt: Receipt) -> None:
        try:
            num_bytes = len(entry.token_ids) + len(receipt.answer)
            states = self._reader.read(receipt, num_bytes // TOKEN_BYTES)
        except WrongStates as error:
            self._store.remove(receipt.key)
            self._settle(entry, error=SampleFailed(f"sample {entry.name!r}: {error}"))
        except ObjectGone as error:
            if receipt.key == entry.keys[-1]:
                status = f"engine {receipt.engine} served it, then: {error}"
                entry.postpone(status, self._deadline_s)
        else:
            self._stats.num_bytes += states.nbytes
            self._remove_all_of(entry)
            entry.answer = receipt.answer
            self._settle(entry, states=states)

    def _remove_all_of(self, entry: Ticket) -> None:
        """Removes the objects of all tries: an engine may have died before it told of one.

        One that is still to be written by an engine, and never to be told of, is removed later.
        """
        late = time.monotonic() + self._deadline_s
        for key in entry.keys:
            self._store.remove(key)
            if len(entry.keys) > 1:
                self._leftovers.append((late, key))

    def _remove_leftovers(self) -> None:
        while self._leftovers and time.monotonic() > self._leftovers[0][0]:
            self._store.remove(self._leftovers.popleft()[1])

    def _check_holders(self) -> None:
        """Has what a lost engine had taken sent again."""
        with self._changed:
            waiting = {e.keys[-1]: e for e in self._tickets.values() if not e.settled and e.place}
        places = {key: entry.place for key, entry in waiting.items()}
        for key, status in self._holders.lost(places).items():
            waiting[key].postpone(status, self._deadline_s)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        with self._changed:
            due = [e for e in self._tickets.values() if not e.settled and now >= e.due]
        if not due:
            return
        num_taken = self._control.requests_taken()
        for entry in due:
            if entry.place > num_taken:  # asking again would only make the queue longer
                entry.status = "no engine has taken it from the queue"
                entry.due = now + self._deadline_s
                if now - entry.submitted > self._queued_limit_s:
                    self._settle(entry, error=entry.too_late())
            else:
                self._retry(entry)

    def _retry(self, entry: Ticket) -> None:
        if entry.place:
            entry.status = "an engine took it and never answered"
        if len(entry.keys) >= self._max_tries:
            self._settle(entry, error=entry.too_late())
            return
        logger.warning("sample %s, request %d: %s", entry.name, len(entry.keys), entry.status)
        with self._changed:
            self._stats.num_retries += 1
            self._send(entry)

    def _send(self, entry: Ticket) -> None:
        """Pushes a request under a new key; the lock is held."""
        # a serial number, since a ticket's name may be used again
        key = f"{self._key_prefix}/{entry.name}/{next(self._serial)}"
        request = Request(
            ticket=entry.name,
            attempt_no=len(entry.keys),
            reply_to=self._rank,
            segment=self._segment,
            key=key,
            token_ids=entry.token_ids,
            generation=entry.generation,
        )
        entry.keys.append(key)
        entry.due = time.monotonic() + self._deadline_s
        entry.place = self._control.push_request(request)
        entry.status = "in the queue"

    def _settle(
        self,
        entry: Ticket,
        *,
        states: torch.Tensor | None = None,
        error: Exception | None = None,
    ) -> None:
        with self._changed:
            entry.states, entry.error = states, error
            self._changed.notify_all()
