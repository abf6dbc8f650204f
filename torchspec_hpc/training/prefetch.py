"""Micro-batches are made ready in the background, ahead of the step that trains on them.

Two threads: one asks for hidden states as far ahead as it may, so that the engines always have
work; the other takes what came and packs it. The step only picks up what is finished.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import fields
from queue import Empty, SimpleQueue

import torch

from torchspec_hpc.data.sample import Sample
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.training.answers import Answers
from torchspec_hpc.transfer.feed import GaveUp

#: Ticket and sample of each document of a micro-batch.
Documents = list[tuple[str, Sample]]

_ASK_S = 0.5  # between questions to `give_up`, which may look at a shared file system
_CLOSE_S = 60.0  # the longest call under way, to a control store that does not answer

logger = logging.getLogger(__name__)


class Prefetcher:
    """Hands out micro-batches in the order of their stream.

    Args:
        stream: Read in the background, from the first :meth:`next` on.
        answers: Where samples are asked for; called from two threads.
        device: Where they are going: pinned memory overlaps the copy to a GPU.
        depth: Micro-batches asked for and not yet picked up.
        window_tokens: Tokens of those, unless a single one has more.
    """

    def __init__(
        self,
        stream: Iterator[Documents],
        answers: Answers,
        device: torch.device,
        depth: int,
        window_tokens: int,
    ) -> None:
        self._stream, self._answers, self._device = stream, answers, device
        self._depth, self._window_tokens = depth, window_tokens
        self._open: deque[int] = deque()  # tokens of what is asked for and not picked up
        self._changed = threading.Condition()  # guards it
        self._closing = threading.Event()
        # an exception is the last item of either queue
        self._asked: SimpleQueue[Documents | Exception] = SimpleQueue()
        self._ready: SimpleQueue[PackedBatch | Exception] = SimpleQueue()
        self._threads = [
            threading.Thread(target=run, name=run.__name__.strip("_"), daemon=True)
            for run in (self._ask_ahead, self._pack_ahead)
        ]

    def next(self, give_up: Callable[[], bool] | None = None) -> PackedBatch:
        """The next micro-batch, on the CPU.

        Args:
            give_up: Asked now and then while there is none; True ends the wait.

        Raises:
            GaveUp: `give_up` said so.
            IndexError: The stream is at its end.
            Exception: What the stream, asking or taking raised, once all before it is picked up.
        """
        if self._threads[0].ident is None:
            for thread in self._threads:
                thread.start()
        while True:
            try:
                made = self._ready.get(timeout=_ASK_S)
            except Empty:
                if give_up is not None and give_up():
                    raise GaveUp("gave up waiting for the next micro-batch") from None
                continue
            if isinstance(made, Exception):
                self._ready.put(made)  # there will be no other
                raise made
            with self._changed:
                self._open.popleft()
                self._changed.notify_all()
            return made

    def close(self) -> None:
        """Ends the threads; what was asked for is given up."""
        self._closing.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is None:
                continue
            thread.join(_CLOSE_S)
            if thread.is_alive():
                logger.warning("thread %s hangs in a call; it is left behind", thread.name)

    def _ask_ahead(self) -> None:
        try:
            for documents in self._stream:
                self._wait_for_room(sum(self._answers.most_tokens(s) for _, s in documents))
                for ticket, sample in documents:
                    self._answers.submit(ticket, sample)
                self._asked.put(documents)
            self._asked.put(IndexError("the stream of micro-batches is at its end"))
        except Exception as error:  # noqa: BLE001 - raised again by `next`
            self._asked.put(error)

    def _wait_for_room(self, num_tokens: int) -> None:
        """Waits until a micro-batch may be asked for, and counts it."""

        def has_room() -> bool:
            return not self._open or (
                len(self._open) < self._depth
                and sum(self._open) + num_tokens <= self._window_tokens
            )

        with self._changed:
            self._changed.wait_for(lambda: self._closing.is_set() or has_room())
            if self._closing.is_set():
                raise GaveUp("the stream of micro-batches was closed")
            self._open.append(num_tokens)

    def _pack_ahead(self) -> None:
        try:
            if self._device.type == "cuda":  # of this thread: else memory is pinned for GPU 0
                torch.cuda.set_device(self._device)
            while not isinstance(documents := self._asked.get(), Exception):
                self._ready.put(self._pack(documents))
            self._ready.put(documents)
        except Exception as error:  # noqa: BLE001 - raised again by `next`
            self._ready.put(error)

    def _pack(self, documents: Documents) -> PackedBatch:
        closing = self._closing.is_set
        taken = [self._answers.take(ticket, sample, closing) for ticket, sample in documents]
        # copies: the feed uses the memory of what it handed out again
        batch = pack([(sample.input_ids, sample.loss_mask, states) for sample, states in taken])
        return _pinned(batch) if self._device.type == "cuda" else batch


def _pinned(batch: PackedBatch) -> PackedBatch:
    return PackedBatch(**{f.name: getattr(batch, f.name).pin_memory() for f in fields(batch)})
