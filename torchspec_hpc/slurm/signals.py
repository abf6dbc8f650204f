"""Signals to the supervisor, taken up between two looks at its processes."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from typing_extensions import Self

_HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class SignalInbox:
    """Collects signals while it is entered, and restores the handlers after.

    SIGCONT, which Slurm sends before SIGTERM, needs no handler.
    """

    def __init__(self) -> None:
        self._received: list[signal.Signals] = []
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        for number in _HANDLED:
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def take(self) -> list[signal.Signals]:
        """Signals since the last call, in the order of their arrival."""
        taken, self._received = self._received, []
        return taken

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(signal.Signals(number))
