"""How the processes of one engine that spans several nodes find each other, and part.

The first node's process makes up a *session*, a port and a name, and writes it to
``control/engines/engine_<e>.json``; the others join it.  A session works once, with all or
with none: whoever starts anew and finds that it was in the session already takes the file
away, and whoever misses the file ends, to be started again by its shepherd.  So one process
that dies takes its engine down, and the engine comes back whole; training goes on with the
others meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspec_hpc.config import RunDir
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.config.ports import free_port
from torchspec_hpc.config.rundir import write_atomic
from torchspec_hpc.errors import EXIT_CRASH, DeadlineExceeded
from torchspec_hpc.inference.placement import Placement

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_WATCH_S = 2.0


@dataclass(frozen=True)
class Session:
    """What the processes of one engine agree on.

    Attributes:
        name: New for every try.
        attempt: Of the run.
        address: Of the first node.
        port: Free there when the session was made.
    """

    name: str
    attempt: int
    address: str
    port: int


class EngineGroup:
    """One process's view of its engine's session.

    Args:
        run: The run.
        endpoints: Of this attempt.
        placement: Which engine, and which of its nodes.
    """

    def __init__(self, run: RunDir, endpoints: Endpoints, placement: Placement) -> None:
        folder = run.control / "engines"
        folder.mkdir(exist_ok=True)
        self._endpoints = endpoints
        self._file = folder / f"engine_{placement.engine}.json"
        self._mine = folder / f"engine_{placement.engine}_node_{placement.node}"
        self._left = threading.Event()

    def lead(self) -> Session:
        """Makes a session; for the process of the first node."""
        address = self._endpoints.own_address()
        name = secrets.token_hex(8)
        session = Session(name, self._endpoints.attempt, address, free_port(address))
        write_atomic(self._file, asdict(session))
        return session

    def join(self, deadline_s: float) -> Session:
        """Waits for a session that this process's forerunners were not in, and enters it.

        Raises:
            DeadlineExceeded: There was none in time.
        """
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            session = self._read()
            if session is not None and session.attempt == self._endpoints.attempt:
                if session.name != _text(self._mine):
                    write_atomic(self._mine, session.name)
                    return session
                logger.warning("the engine's session %s broke with our forerunner", session.name)
                self._file.unlink(missing_ok=True)
            time.sleep(_POLL_S)
        raise DeadlineExceeded(
            f"the first process of the engine ({self._file})",
            deadline_s,
            hint="see its log; control.engine_ready_s",
        )

    def watch(self, session: Session) -> None:
        """Ends this process, from a thread, once the session is over."""
        threading.Thread(target=self._watch, args=(session,), name="session", daemon=True).start()

    def leave(self) -> None:
        """Ends the session: the other processes of the engine follow."""
        self._left.set()
        self._file.unlink(missing_ok=True)

    def _watch(self, session: Session) -> None:
        while not self._left.wait(_WATCH_S):
            if self._read() != session and not self._left.is_set():
                logger.error("the engine's session is over: another of its processes has ended")
                logging.shutdown()
                os._exit(EXIT_CRASH)  # the main thread hangs in a collective

    def _read(self) -> Session | None:
        text = _text(self._file)
        return Session(**json.loads(text)) if text else None


def _text(path: Path) -> str:
    with contextlib.suppress(FileNotFoundError):
        return path.read_text(encoding="utf-8")
    return ""
