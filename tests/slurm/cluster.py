"""A real Slurm cluster in one temporary directory: munge, slurmctld, and a slurmd per node.

No root, no systemd, no cgroups, free ports; idle within about a second.  The nodes are
virtual: they share this machine, each with its own slurmd, spool directory and address.
With ``isolated_network=True`` (root) each node also has its own network and host name, as
on a real cluster, where ``127.0.0.1`` and a fixed port mean another thing on every node.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from typing_extensions import Self

from tests.slurm.network import isolated_nodes
from tests.slurm.slurm_conf import Layout, slurm_conf
from torchspec_hpc.slurm.shepherd import descendants

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmscriptd")
#: States in which a job is over.
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
)
_ENDING = ("COMPLETING", "REQUEUED")


def missing_programs() -> list[str]:
    """Programs of Slurm and munge that this machine lacks."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


class Cluster:
    """A running cluster, as a context manager."""

    def __init__(self, layout: Layout | None = None) -> None:
        self.layout = layout or Layout()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for tries_left in (2, 1, 0):
            with ExitStack() as stack:
                try:
                    self._start(stack)
                except RuntimeError:  # rarely, a free port was taken before a daemon bound it
                    if not tries_left:
                        raise
                else:
                    self._stack = stack.pop_all()
                    break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def env(self) -> dict[str, str]:
        """Environment of a user's login shell on this cluster."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**clean, "SLURM_CONF": str(self.conf)}

    def run(self, *argv: str | Path, timeout_s: float = 60, cwd: Path | None = None) -> str:
        """Runs a client program and returns what it prints; raises where it fails."""
        done = subprocess.run(
            argv, env=self.env, cwd=cwd, text=True, capture_output=True, timeout=timeout_s
        )
        if done.returncode:
            raise RuntimeError(f"{argv} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def sbatch(self, *argv: str | Path, cwd: Path | None = None) -> str:
        """Submits and returns the id of the job, for a het job that of its leader."""
        return self.run("sbatch", "--parsable", *argv, cwd=cwd).strip().split(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says; of a het job, about its leader."""
        line = self.run("scontrol", "show", "job", "-o", job_id).splitlines()[0]
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def state(self, job_id: str) -> str:
        return self.job(job_id)["JobState"]

    def exit_code(self, job_id: str) -> int:
        """Exit code of the batch script."""
        return int(self.job(job_id)["ExitCode"].split(":")[0])

    def wait_state(
        self, job_id: str, states: Collection[str] = ENDED, timeout_s: float = 30
    ) -> dict[str, str]:
        """Waits until the job is in one of the states, by default until it is over.

        Returns:
            What :meth:`job` says then.
        """
        info: dict[str, str] = {}

        def reached() -> bool:
            info.update(self.job(job_id))
            return info["JobState"] in states

        wait_for(reached, f"job {job_id} to become {' or '.join(sorted(states))}", timeout_s)
        return info

    def wait_restart(self, job_id: str, restarts: int, timeout_s: float = 60) -> None:
        """Waits until a requeued job runs again, without Slurm's usual delay."""

        def requeued() -> bool:
            info = self.job(job_id)
            return int(info["Restarts"]) >= restarts and info["JobState"] not in _ENDING

        def started() -> bool:
            for component in self.run("squeue", "-h", "-j", job_id, "-O", "JobID").split():
                with suppress(RuntimeError):  # it started meanwhile
                    self.run("scontrol", "update", f"JobId={component}", "StartTime=now")
            return self.state(job_id) != "PENDING"

        wait_for(requeued, f"restart {restarts} of job {job_id}", timeout_s)
        # Slurm itself waits for cred_expire, 120 s elsewhere, and for a reason: credentials count
        # in seconds, and what starts in the second in which it was killed fails at once
        time.sleep(2)
        wait_for(started, f"start of job {job_id}", timeout_s)

    def warn(self, job_id: str, signal: str = "USR1") -> None:
        """Imitates the warning of ``--signal=B:``, which really comes on a 30 s tick."""
        self.run("scancel", "--batch", f"--signal={signal}", job_id)

    def cancel(self, job_id: str) -> None:
        self.run("scancel", job_id)

    def job_processes(self) -> list[str]:
        """Command lines of everything that jobs run, or left behind, at this moment."""
        lines = []
        for pid in descendants(self._keeper.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:  # ended meanwhile
                continue
            # daemons rename themselves: "slurmstepd: [1.batch]", ": slurmscriptd"
            program = Path(words[0].lstrip(": ")).name
            if program and not program.startswith(_DAEMONS):
                lines.append(" ".join(words).strip())
        return lines

    def _start(self, stack: ExitStack) -> None:
        # unix sockets have at most 108 characters: pytest's directories are too long
        self.root = Path(stack.enter_context(TemporaryDirectory(prefix="slurm-", dir="/tmp")))
        self.conf = self.root / "etc" / "slurm.conf"
        self._namespaces: dict[str, str] = {}
        self._head = "127.0.0.1"
        self.addresses = {node: f"127.0.1.{i + 1}" for i, node in enumerate(self.layout.nodes)}
        if self.layout.isolated_network:
            network = stack.enter_context(isolated_nodes(self.layout.nodes))
            self._head, self.addresses = network.head, network.addresses
            self._namespaces = network.namespaces
        self._prepare()
        log = stack.enter_context((self.root / "log" / "keeper.out").open("w"))
        self._keeper = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("keeper.py")), self.root / "layout.json"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=self.env,
            start_new_session=True,  # an interrupt from the keyboard is for the tests alone
        )
        stack.enter_context(self._keeper)  # closes stdin, which stops the cluster, and waits
        assert self._keeper.stdout
        if self._keeper.stdout.readline() != "READY\n":
            self._keeper.wait(30)
            raise RuntimeError(f"the cluster did not start: {log_tails(self.root / 'log')}")

    def _prepare(self) -> None:
        for name in ("etc", "state", "run", "log", "dev", *(f"spool/{n}" for n in self.addresses)):
            (self.root / name).mkdir(parents=True)
        for i in range(self.layout.gpus):  # gres wants a device file; its content is never used
            (self.root / "dev" / f"nvidia{i}").symlink_to("/dev/null")
        key = self.root / "run" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        own_hosts = bool(self._namespaces)
        self.conf.write_text(
            slurm_conf(self.root, self.layout, self._head, self.addresses, own_hosts=own_hosts)
        )
        # slurmd loads a cgroup plugin even when nothing uses one, and finding the right version
        # by itself is fatal where /sys/fs/cgroup is not mounted
        self.conf.with_name("cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.conf.with_name("gres.conf").write_text(
            f"AutoDetect=off\nNodeName={','.join(self.addresses)} Name=gpu "
            f"File={self.root}/dev/nvidia[0-{self.layout.gpus - 1}]\n"
        )
        layout = {
            "root": str(self.root),
            "nodes": list(self.addresses),
            "namespaces": self._namespaces,
        }
        (self.root / "layout.json").write_text(json.dumps(layout))


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Polls until `condition` holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s} s for {what}")
        time.sleep(0.1)


def log_tails(folder: Path) -> str:
    """The last lines of every log of the daemons, for the message of a failed start."""
    return "\n".join(
        f"== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-8:])
        for path in sorted(folder.iterdir())
    )
