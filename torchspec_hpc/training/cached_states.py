"""Hidden states from the disk where they are there, and else from the engines; then they are kept.

Reading and writing happen in threads of their own: a sample's file is read as soon as the sample
is asked for, and what an engine answered is written while the next answers come.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from torchspec_hpc.training.state_cache import StateCache, name_of
from torchspec_hpc.transfer.feed import FeedStats, GaveUp, HiddenStateFeed, SampleFailed

_NUM_READERS, _NUM_WRITERS = 4, 2
#: Answers that wait for the disk, in the feed's memory; training waits with them for more.
_WRITES_AHEAD = 4
_ASK_S = 0.5  # between questions to `give_up`, which may look at a shared file system

logger = logging.getLogger(__name__)

TokenIds = NDArray[np.int32]


class CachedStates:
    """Stands between whoever asks for hidden states and the feed.

    One thread submits, and one, perhaps another, takes.

    Args:
        cache: Where states are kept.
        feed: Asked for what is not there; None: there are no engines.
        keep_up_to: The last name of those whose states are kept; see ``cache_plan``.
    """

    def __init__(self, cache: StateCache, feed: HiddenStateFeed | None, keep_up_to: str) -> None:
        self._cache, self._feed, self._keep_up_to = cache, feed, keep_up_to
        self._readers = ThreadPoolExecutor(_NUM_READERS, "cache-reader")
        self._writers = ThreadPoolExecutor(_NUM_WRITERS, "cache-writer")
        self._writes: deque[Future[None]] = deque()
        self._lock = threading.Lock()
        self._open: dict[str, tuple[TokenIds, Future[Tensor | None] | None]] = {}

    def submit(self, ticket: str, token_ids: TokenIds) -> None:
        """Begins to read the hidden states of token ids [T], or asks the engines for them."""
        reading = None
        if self._cache.holds(token_ids):
            reading = self._readers.submit(self._cache.read, token_ids)
        else:
            self._ask(ticket, token_ids)
        with self._lock:
            self._open[ticket] = token_ids, reading

    def take(self, ticket: str, give_up: Callable[[], bool] | None = None) -> Tensor:
        """Waits for the hidden states [T, A+1, H] of a sample that was asked for.

        Raises:
            GaveUp: `give_up` said so.
            SampleFailed: There is no engine, and the file has vanished or is damaged.
            Exception: What the feed raises.
        """
        with self._lock:
            token_ids, reading = self._open[ticket]
        if reading is not None:
            states = _result(reading, ticket, give_up)
            if states is not None:
                self._forget(ticket)
                return states
            self._ask(ticket, token_ids)  # once: from now on it is the feed's
            with self._lock:
                self._open[ticket] = token_ids, None
        assert self._feed is not None  # or nobody could have been asked
        states = self._feed.take(ticket, give_up)
        self._forget(ticket)
        if name_of(token_ids) <= self._keep_up_to:
            self._keep(token_ids, states)
        return states

    def stats(self) -> FeedStats:
        """Totals of what the engines sent."""
        return FeedStats() if self._feed is None else self._feed.stats()

    def close(self) -> None:
        """Waits until what was taken is written."""
        self._readers.shutdown(cancel_futures=True)
        while self._writes:
            self._writes.popleft().result()
        self._writers.shutdown()

    def _ask(self, ticket: str, token_ids: TokenIds) -> None:
        if self._feed is None:
            raise SampleFailed(
                f"the hidden states of sample {ticket!r} are no longer in {self._cache.folder}, "
                "or are damaged, and inference.inference_num_gpus = 0: there is no engine to ask"
            )
        self._feed.submit(ticket, token_ids)

    def _forget(self, ticket: str) -> None:
        with self._lock:
            del self._open[ticket]

    def _keep(self, token_ids: TokenIds, states: Tensor) -> None:
        while len(self._writes) >= _WRITES_AHEAD or (self._writes and self._writes[0].done()):
            self._writes.popleft().result()
        self._writes.append(self._writers.submit(self._cache.write, token_ids, states))


def _result(
    reading: Future[Tensor | None], ticket: str, give_up: Callable[[], bool] | None
) -> Tensor | None:
    while not wait_for([reading], timeout=_ASK_S).done:
        if give_up is not None and give_up():
            raise GaveUp(f"gave up waiting for sample {ticket!r}: its file is being read")
    return reading.result()
