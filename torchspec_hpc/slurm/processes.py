"""Commands that the supervisor starts on its own node."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGKILL, Signals

_TAIL_BYTES = 8192
_POLL_S = 0.05


class Child:
    """A running command with its own session and its output in a log file.

    Args:
        argv: The command.
        log: File that stdout and stderr are appended to.
        env: Environment.
    """

    def __init__(self, argv: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self.argv, self.log = list(argv), log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                self.argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the supervisor alone
            )

    def poll(self) -> int | None:
        """Exit code, 128 and the signal where one ended it; None while it runs."""
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def signal(self, number: Signals) -> None:
        """Sends a signal to the command itself, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def wait(self, seconds: float) -> int | None:
        """Waits for the end, at most so long; returns what :meth:`poll` then says."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return code

    def end(self, number: Signals, seconds: float) -> None:
        """Sends a signal and, should it not have ended the command in time, SIGKILL."""
        self.signal(number)
        if self.wait(seconds) is None:
            self.signal(SIGKILL)
            self.wait(seconds)


def shepherded(command: Sequence[str], *options: str, python: str = sys.executable) -> list[str]:
    """The command under a :mod:`~torchspec_hpc.slurm.shepherd`; end it with SIGQUIT."""
    return [python, "-m", "torchspec_hpc.slurm.shepherd", *options, "--", *command]


def tail(log: Path, num_lines: int = 15) -> str:
    """The last lines of a log, indented; says so where there are none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        lines = []
    return "\n".join(f"    {line}" for line in lines) or "    (empty)"
