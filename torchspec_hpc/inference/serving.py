"""The loop of one inference rank: take requests, run the engine, reply."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.inference.engines.base import Captured, Engine, EnginePrompt, Result
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import MessageError, Receipt, Refusal, Request

logger = logging.getLogger(__name__)

#: How long one look into an empty queue lasts, in seconds.
_IDLE_POLL_S = 0.5


@dataclass
class Progress:
    """What an inference rank has done since it started; the payload of its heartbeat.

    Attributes:
        ready: The engine is up.
        tokens: Prompt tokens whose states are in the store.
        batches: Engine batches.
        busy_s: Seconds the engine spent on them, writing included.
        refused: Prompts that were not served.
    """

    ready: bool = False
    tokens: int = 0
    batches: int = 0
    busy_s: float = 0.0
    refused: int = 0


class Heartbeat:
    """Reports a rank's progress from a thread of its own: an engine may load for minutes.

    Args:
        control: Connection to the control store.
        rank: Inference rank.
        progress: Read at every beat.
        interval_s: Seconds between beats.
    """

    def __init__(
        self, control: ControlClient, rank: int, progress: Progress, interval_s: float
    ) -> None:
        self._control, self._rank, self._progress = control, rank, progress
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Sends the first beat and keeps going."""
        self.beat()
        self._thread.start()

    def beat(self) -> None:
        """Sends one beat now."""
        self._control.heartbeat("inference", self._rank, asdict(self._progress))

    def stop(self) -> None:
        """Lets the thread end; a beat may be under way."""
        self._stop.set()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._interval_s):
                self.beat()
        except TorchspecError as error:
            # the serving loop meets the same error at its next call and ends the process
            logger.warning("no more heartbeats: %s", error)


class Server:
    """Serves requests with one engine.

    Args:
        engine: Ready to run.
        control: Connection to the control store.
        rank: Inference rank, named in receipts.
        progress: Kept up to date.
    """

    def __init__(
        self, engine: Engine, control: ControlClient, rank: int, progress: Progress
    ) -> None:
        self._engine, self._control = engine, control
        self._rank, self._progress = rank, progress
        self._held: Request | None = None

    def serve(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set.

        Raises:
            ControlLost: The control store is gone.
        """
        while not stop.is_set():
            if batch := self._next_batch():
                self._run(batch)

    def _next_batch(self) -> list[Request]:
        """Requests that are there now and fit into one engine batch."""
        batch: list[Request] = []
        tokens = 0
        while len(batch) < self._engine.max_prompts:
            request, self._held = self._held or self._pop(wait=not batch), None
            if request is None:
                break
            tokens += len(request.tokens)
            if batch and tokens > self._engine.max_tokens:
                self._held = request  # the first of the next batch
                break
            batch.append(request)
        return batch

    def _pop(self, *, wait: bool) -> Request | None:
        try:
            request = self._control.pop_request(_IDLE_POLL_S if wait else 0.0)
            if request is not None:
                request.tokens  # noqa: B018 - raises here when the bytes are no token ids
        except MessageError as error:  # whoever sent it hears nothing and asks again
            logger.error("dropped a request: %s", error)
            return None
        return request

    def _run(self, batch: list[Request]) -> None:
        start = time.monotonic()
        results = self._engine.prefill(
            [EnginePrompt(request.key, request.segment, request.tokens) for request in batch]
        )
        self._progress.batches += 1
        self._progress.busy_s += time.monotonic() - start
        for request, result in zip(batch, results, strict=True):
            self._reply(request, result)

    def _reply(self, request: Request, result: Result) -> None:
        reply: Receipt | Refusal
        if isinstance(result, Captured):
            self._progress.tokens += result.shape[0]
            reply = Receipt(
                ticket=request.ticket,
                key=result.key,
                shape=result.shape,
                dtype=result.dtype,
                engine=self._rank,
            )
        else:
            self._progress.refused += 1
            logger.warning("refused %s: %s", request.ticket, result.reason)
            reply = Refusal(
                ticket=request.ticket,
                key=result.key,
                reason=result.reason,
                permanent=result.permanent,
            )
        self._control.push_reply(request.reply_to, reply)
