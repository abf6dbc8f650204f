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
  detached itself.

SIGINT is passed on: the polite way to end the command.  The exit code is the command's, 128
and the signal where one ended it.  Only the standard library is imported, so that the shield
is up within milliseconds.
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

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)

_SHIELDED = {signal.SIGTERM, signal.SIGUSR1}
#: The kernel sends it when the thread that started us ends, be the process alive or not.
_PARENT_DIED = signal.SIGUSR2
_TICK_S = 1.0
_SWEEP_S = 10.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    arguments = _parse(argv)
    parent = os.getppid()
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK,
        _SHIELDED | {_PARENT_DIED, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD},
    )
    _LIBC.prctl(_PR_SET_PDEATHSIG, _PARENT_DIED, 0, 0, 0)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    environment = dict(os.environ)
    for copy in arguments.copy_env:
        source, _, target = copy.partition("=")
        environment[target] = os.environ.get(source, "0")

    def enter() -> None:  # in the child, before it becomes the command
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before | _SHIELDED)

    try:
        # this process has one thread, so preexec_fn is safe
        child = subprocess.Popen(arguments.command, env=environment, preexec_fn=enter)
    except OSError as error:
        sys.stderr.write(f"cannot start {arguments.command[0]}: {error.strerror}\n")
        return 127
    try:
        code = _tend(child, parent, arguments.stop_file)
    finally:
        _sweep()
    return code if code >= 0 else 128 - code


def _tend(child: subprocess.Popen[bytes], parent: int, stop_file: Path | None) -> int:
    """Waits for the command, acting on signals."""
    waited_for = _SHIELDED | {_PARENT_DIED, signal.SIGINT, signal.SIGQUIT, signal.SIGCHLD}
    while (code := child.poll()) is None:
        received = signal.sigtimedwait(waited_for, _TICK_S)
        number = received.si_signo if received else None
        if number in _SHIELDED and stop_file is not None:
            _ask_to_stop(stop_file, signal.Signals(number).name)
        elif number == signal.SIGINT:
            child.send_signal(signal.SIGINT)
        elif number == signal.SIGQUIT or (number == _PARENT_DIED and os.getppid() != parent):
            return -signal.SIGKILL  # the sweep ends it
    return code


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
    parser.add_argument("command", nargs="+")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
