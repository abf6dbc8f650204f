"""The parent of one long-running command: ``python -m torchspec_hpc.slurm.shepherd -- COMMAND``.

One stands above every service, engine and torchrun, on whatever node that runs, and does
what none of them does for itself:

- **Shields it from SIGTERM and SIGUSR1.**  Before Slurm kills a job (time limit, preemption,
  ``scontrol requeue``) it sends SIGTERM to *every* process of it, torchrun, engines and
  Mooncake master included, although the trainers still need all of them to finish their
  step and to write a checkpoint in the ``KillWait`` seconds that are left.  The signals are
  blocked, not ignored: a handler that the command installs would replace an ignored signal.
- **Turns them into a file.**  With ``--stop-file`` either signal writes that file, which asks
  the trainers for a checkpoint.  Written on the trainers' own node it is visible to them at
  once, whatever the shared file system caches.
- **Leaves nothing behind.**  When the command ends, when SIGQUIT arrives, or when the
  shepherd's own parent dies, everything that the command started is killed, also what has
  detached itself.  A file that says that the command serves is removed with it.
- **Starts it again.**  With ``--restarts`` a command that dies is started again in place, after
  a pause that grows with each death.  An exit code that says "done", or that only its user can
  mend what is wrong, ends it for good.

SIGINT is passed on: the polite way to end the command.  The exit code is the command's, 128
and the signal where one ended it.  Little but the standard library is imported, so that the
shield is up within milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torchspec_hpc.errors import EXIT_DONE, EXIT_USER_ERROR

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)

_SHIELDED = {signal.SIGTERM, signal.SIGUSR1}
#: The kernel sends it when the thread that started us ends, be the process alive or not.
_PARENT_DIED = signal.SIGUSR2
_WAITED_FOR = _SHIELDED | {_PARENT_DIED, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD}
_TICK_S = 1.0
_SWEEP_S = 10.0
#: Exit codes after which another start would change nothing.
_FINAL = {EXIT_DONE, EXIT_USER_ERROR}
#: Before the first restart; twice as long before each further one, up to the limit.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 60.0
#: A command that has run for so long was well: the count of its deaths begins anew.
_WELL_S = 600.0
#: In the command and in the name of its file: its rank. See ``--first-rank``.
_RANK = "{rank}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, as often as it takes, and returns its last exit code."""
    arguments = _parse(argv)
    parent = os.getppid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    _LIBC.prctl(_PR_SET_PDEATHSIG, _PARENT_DIED, 0, 0, 0)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    environment = dict(os.environ)
    for copy in arguments.copy_env:
        source, _, target = copy.partition("=")
        environment[target] = os.environ.get(source, "0")

    def enter() -> None:  # in the child, before it becomes the command
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before | _SHIELDED)

    shepherd = Shepherd(arguments, parent)
    while True:
        started = time.monotonic()
        try:
            # this process has one thread, so preexec_fn is safe
            child = subprocess.Popen(arguments.command, env=environment, preexec_fn=enter)
        except OSError as error:
            sys.stderr.write(f"cannot start {arguments.command[0]}: {error.strerror}\n")
            return 127
        try:
            code = shepherd.tend(child)
        finally:
            _sweep()
            if arguments.ready_file is not None:
                arguments.ready_file.unlink(missing_ok=True)
        if not shepherd.starts_again(code, time.monotonic() - started):
            return code


class Shepherd:
    """What it has seen and been told so far.

    Args:
        arguments: Its command line.
        parent: Process that started it.
    """

    def __init__(self, arguments: argparse.Namespace, parent: int) -> None:
        self._stop_file: Path | None = arguments.stop_file
        self._max_restarts: int = arguments.restarts
        self._name = " ".join(arguments.command[:3])
        self._parent = parent
        self._num_restarts = 0
        self._dismissed = False

    def tend(self, child: subprocess.Popen[bytes]) -> int:
        """Waits for the command, acting on signals; returns its exit code."""
        while (code := child.poll()) is None:
            number = self._next_signal(_TICK_S)
            if number == signal.SIGINT:
                child.send_signal(signal.SIGINT)
            elif number == signal.SIGQUIT:
                return 128 + signal.SIGKILL  # the sweep ends it
        return code if code >= 0 else 128 - code

    def starts_again(self, code: int, lived_s: float) -> bool:
        """Decides on another start, and waits until it is due."""
        if self._max_restarts == 0 or self._dismissed or code in _FINAL:
            return False
        if lived_s > _WELL_S:
            self._num_restarts = 0
        if self._num_restarts == self._max_restarts:
            _say(f"{self._name} ended with {code}; it was started again {self._num_restarts} times")
            return False
        pause_s = min(_FIRST_PAUSE_S * 2**self._num_restarts, _LAST_PAUSE_S)
        self._num_restarts += 1
        number = f"{self._num_restarts} of {self._max_restarts}"
        _say(f"{self._name} ended with {code}; restart {number} in {pause_s:.0f} s")
        due = time.monotonic() + pause_s
        while not self._dismissed and (left_s := due - time.monotonic()) > 0:
            self._next_signal(min(left_s, _TICK_S))
        return not self._dismissed

    def _next_signal(self, seconds: float) -> int | None:
        """Waits for a signal: SIGINT or SIGQUIT to end the command, which end it for good."""
        received = signal.sigtimedwait(_WAITED_FOR, seconds)
        number = received.si_signo if received else None
        if number in _SHIELDED and self._stop_file is not None:
            _ask_to_stop(self._stop_file, signal.Signals(number).name)
        if number == _PARENT_DIED and os.getppid() != self._parent:
            number = signal.SIGQUIT
        if number in (signal.SIGINT, signal.SIGQUIT):
            self._dismissed = True
        return number


def _say(message: str) -> None:
    sys.stderr.write(f"shepherd: {message}\n")
    sys.stderr.flush()


def _ask_to_stop(stop_file: Path, name: str) -> None:
    from torchspec_hpc.config.rundir import write_atomic  # late: see the module's docstring

    reason = f"{name} at {os.environ.get('SLURMD_NODENAME', 'a training step')}"
    try:
        write_atomic(stop_file, {"reason": reason, "time": time.time()})
    except OSError as error:  # the supervisor writes it too
        sys.stderr.write(f"cannot write {stop_file}: {error.strerror}\n")


def _sweep() -> None:
    """Kills everything below this process; orphans of the command are its children by now."""
    deadline = time.monotonic() + _SWEEP_S
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def descendants(root: int) -> list[int]:
    """Living processes below ``root``, zombies left out."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # ended meanwhile
            continue
        state, parent = stat.rpartition(")")[2].split()[:2]
        if state != "Z":
            children.setdefault(int(parent), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shields, watches and buries one command.")
    parser.add_argument("--stop-file", type=Path, help="written at SIGTERM and SIGUSR1")
    parser.add_argument(
        "--copy-env",
        action="append",
        default=[],
        metavar="SOURCE=TARGET",
        help="copy an environment variable of this node; 0 where it is not set",
    )
    parser.add_argument(
        "--restarts", type=int, default=0, help="starts after deaths in a row; 0: none"
    )
    parser.add_argument(
        "--first-rank",
        type=int,
        default=0,
        help=f"{_RANK} in the command and in --ready-file is this and SLURM_PROCID",
    )
    parser.add_argument("--ready-file", help="removed when the command ends")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args(argv)
    rank = str(arguments.first_rank + int(os.environ.get("SLURM_PROCID", 0)))
    arguments.command = [word.replace(_RANK, rank) for word in arguments.command]
    if arguments.ready_file is not None:
        arguments.ready_file = Path(arguments.ready_file.replace(_RANK, rank))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
