"""The process that owns the daemons of a test cluster: ``python keeper.py LAYOUT.json``.

It is a child sub-reaper: a job's process that outlives its parent becomes a child of the
keeper, so that walking ``/proc`` from here finds everything that belongs to this cluster, and
nothing else is ever touched.  It says ``READY`` on stdout when all nodes are idle, and takes
everything down when its stdin closes: also when the test run itself was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchspec_hpc.slurm.shepherd import descendants

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None)
_STOP_ORDER = ("slurmd", "slurmctld", "munged")
_START_S = 30.0


class Keeper:
    """Starts, watches and stops the daemons of one cluster."""

    def __init__(self, layout: dict[str, Any]) -> None:
        self.root = Path(layout["root"])
        self.nodes: list[str] = layout["nodes"]
        self.namespaces: dict[str, str] = layout["namespaces"]
        self.daemons: dict[int, str] = {}
        self.parent = os.getppid()
        self.env = {**os.environ, "SLURM_CONF": str(self.root / "etc" / "slurm.conf")}

    def start(self) -> None:
        """Returns when every node is idle."""
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        run, log = self.root / "run", self.root / "log"
        # --force: munged dislikes parents such as pytest's own (mode 0700) temporary directory
        self._spawn(
            "munged",
            ["munged", "--foreground", "--force", f"--key-file={run}/munge.key",
             f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
             f"--log-file={log}/munged.log", f"--seed-file={run}/munge.seed"],
        )  # fmt: skip
        self._wait("munge's socket", (run / "munge.sock").exists)
        self._spawn("slurmctld", ["slurmctld", "-D"])
        for node in self.nodes:
            self.start_node(node)
        self._wait("all nodes idle", self._all_idle)

    def start_node(self, node: str) -> None:
        prefix: list[str] = []
        if node in self.namespaces:
            prefix = ["ip", "netns", "exec", self.namespaces[node], "unshare", "--uts",
                      "sh", "-c", f'hostname {node}; exec "$@"', "sh"]  # fmt: skip
        self._spawn(f"slurmd-{node}", [*prefix, "slurmd", "-D", "-N", node])

    def serve(self) -> None:
        """Until stdin closes: collects orphans, reports daemons that die."""
        while not select.select([sys.stdin], [], [], 0.2)[0]:
            self._reap()

    def stop(self) -> None:
        """Ends jobs, daemons, and whatever a job left behind; the folder too if no one else will.

        Whoever started the keeper removes the folder, unless it was killed.
        """
        self._end_jobs()
        for kind in _STOP_ORDER:
            pids = [pid for pid, name in self.daemons.items() if name.startswith(kind)]
            for pid in pids:
                _signal(pid, signal.SIGTERM)
            self._wait_gone(lambda pids=pids: any(pid in self.daemons for pid in pids), 10)
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            for pid in descendants(os.getpid()):
                _signal(pid, signal_number)
            self._wait_gone(lambda: bool(descendants(os.getpid())), 2)
        if os.getppid() != self.parent:
            shutil.rmtree(self.root)

    def _spawn(self, name: str, argv: list[str]) -> None:
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            process = subprocess.Popen(
                argv,
                env=self.env,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # a killed keeper leaves no daemon; the keeper has one thread, so this is safe
                preexec_fn=lambda: _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
            )
        process.returncode = 0  # _reap collects it, not Popen
        self.daemons[process.pid] = name

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if name := self.daemons.pop(pid, None):
                code = os.waitstatus_to_exitcode(status)
                print(f"{name} ended with {code}, see {self.root}/log", file=sys.stderr)

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        deadline, num_daemons = time.monotonic() + _START_S, len(self.daemons)
        while not condition():
            self._reap()
            if len(self.daemons) < num_daemons:
                raise RuntimeError(f"a daemon ended while waiting for {what}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {_START_S:.0f} s for {what}")
            time.sleep(0.02)

    def _wait_gone(self, alive: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while alive() and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.02)

    def _client(self, *argv: str) -> str | None:
        """Output of a Slurm client; None where the controller does not answer."""
        try:
            done = subprocess.run(argv, env=self.env, text=True, capture_output=True, timeout=10)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout if done.returncode == 0 else None

    def _all_idle(self) -> bool:
        states = self._client("sinfo", "-h", "-N", "-o", "%N %T") or ""
        return {f"{node} idle" for node in self.nodes} <= set(states.splitlines())

    def _end_jobs(self) -> None:
        self._client("scancel", "--quiet", "--user", str(os.getuid()))
        self._wait_gone(lambda: bool(self._client("squeue", "-h", "-o", "%A")), 10)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    keeper = Keeper(json.loads(Path(sys.argv[1]).read_text()))
    try:
        keeper.start()
        print("READY", flush=True)
        keeper.serve()
    finally:
        keeper.stop()


if __name__ == "__main__":
    main()
