"""The loop of one inference rank: take requests in, let the engine run."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import asdict, dataclass

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.inference.engines.base import Engine, PromptRefused
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.messages import MessageError, Refusal, Request

logger = logging.getLogger(__name__)

#: How long one look into an empty queue lasts, in seconds.
_IDLE_POLL_S = 0.5


@dataclass
class Progress:
    """What an inference rank has done since it started; the payload of its heartbeat.

    Attributes:
        ready: The engine is up.
        tokens: Tokens whose states are captured.
        steps: Of the engine.
        busy_s: Seconds it spent on them, waiting for room to write included.
        refused: Prompts that were not served.
    """

    ready: bool = False
    tokens: int = 0
    steps: int = 0
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
    """Feeds one engine with requests while it runs.

    Requests are admitted between its steps, up to what keeps it busy: an engine that takes
    more only keeps it from the others, and loses more when it dies.

    Args:
        engine: Ready to run.
        control: Connection to the control store.
        progress: Kept up to date.
    """

    def __init__(self, engine: Engine, control: ControlClient, progress: Progress) -> None:
        self._engine, self._control, self._progress = engine, control, progress
        self._num_open = self._open_tokens = 0
        self._held: Request | None = None

    def serve(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set.

        Raises:
            ControlLost: The control store is gone.
        """
        while not stop.is_set():
            self._admit_what_fits()
            if self._num_open:
                self._step()

    def _admit_what_fits(self) -> None:
        while self._num_open < self._engine.max_prompts:
            request, self._held = self._held or self._pop(), None
            if request is None:
                return
            num_tokens = _most_tokens(request)
            if self._num_open and self._open_tokens + num_tokens > self._engine.max_tokens:
                self._held = request  # the next one to be admitted
                return
            try:
                self._engine.admit(request)
            except PromptRefused as error:
                self._refuse(request, str(error), permanent=True)
            else:
                self._num_open += 1
                self._open_tokens += num_tokens

    def _pop(self) -> Request | None:
        """The next request; waits for one only where the engine has nothing to do."""
        try:
            request = self._control.pop_request(0.0 if self._num_open else _IDLE_POLL_S)
            if request is not None:
                request.tokens  # noqa: B018 - raises here when the bytes are no token ids
        except MessageError as error:  # whoever sent it hears nothing and asks again
            logger.error("dropped a request: %s", error)
            return None
        return request

    def _step(self) -> None:
        start = time.monotonic()
        finished = self._engine.step()
        self._progress.steps += 1
        self._progress.busy_s += time.monotonic() - start
        for end in finished:
            self._num_open -= 1
            self._open_tokens -= _most_tokens(end.request)
            if end.problem is None:
                self._progress.tokens += len(end.request.tokens) + end.num_answer_tokens
            else:
                self._refuse(end.request, end.problem, permanent=False)

    def _refuse(self, request: Request, reason: str, *, permanent: bool) -> None:
        self._progress.refused += 1
        logger.warning("refused %s: %s", request.ticket, reason)
        refusal = Refusal(request.ticket, request.key, reason, permanent)
        self._control.push_reply(request.reply_to, refusal)


def _most_tokens(request: Request) -> int:
    """Of its prompt and the longest answer."""
    return len(request.tokens) + (request.generation.max_tokens if request.generation else 0)
