"""Where the services of a run answer, and the secret its processes share."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, replace

from torchspec_hpc.config.interfaces import interface_address
from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError

#: Names the interface of a worker whose address the others use; unset: what Slurm says.
INTERFACE_VARIABLE = "TORCHSPEC_INTERFACE"
_POLL_S = 0.1


@dataclass(frozen=True)
class Endpoints:
    """Written by the supervisor once the services of an attempt answer.

    Attributes:
        run_id: ``<run_name>-<8 hex digits>``, the same in every attempt.
        attempt: Counts from 0.
        control: ``host:port`` of the control store.
        mooncake_master: ``host:port`` of the Mooncake master.
        addresses: Node name -> address by which the other nodes reach it, those of jobs that
            have joined the run included.
    """

    run_id: str
    attempt: int
    control: str
    mooncake_master: str
    addresses: dict[str, str]

    @classmethod
    def read(cls, run: RunDir, deadline_s: float) -> Endpoints:
        """Waits for the endpoints of this attempt.

        Raises:
            DeadlineExceeded: They were not published within ``deadline_s`` seconds.
        """
        deadline = time.monotonic() + deadline_s
        while not run.endpoints.is_file():
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"the services' addresses in {run.endpoints}",
                    deadline_s,
                    hint=f"see the supervisor's log under {run.logs}",
                )
            time.sleep(_POLL_S)
        own = cls(**json.loads(run.endpoints.read_text(encoding="utf-8")))
        joined = []
        for path in run.joined.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # that job has just left
                joined.append(json.loads(path.read_text(encoding="utf-8")))
        addresses = {node: a for job in joined for node, a in job["addresses"].items()}
        return replace(own, addresses=addresses | own.addresses)

    def write(self, run: RunDir) -> None:
        """Publishes the endpoints, whole or not at all."""
        write_atomic(run.endpoints, asdict(self))

    @property
    def attempt_id(self) -> str:
        """``<run_id>.<attempt>``: unique to one attempt of one run."""
        return f"{self.run_id}.{self.attempt}"

    def own_address(self) -> str:
        """The address by which the other nodes of the run reach this one.

        Raises:
            TorchspecError: This node is not one of the run's, or lacks the interface.
        """
        if interface := os.environ.get(INTERFACE_VARIABLE):
            return interface_address(interface)
        name = node_name()
        try:
            return self.addresses[name]
        except KeyError:
            raise TorchspecError(
                f"node {name!r} has no address in this run; it has: {sorted(self.addresses)}"
            ) from None


def node_name() -> str:
    """This node as Slurm calls it, or its host name outside of Slurm."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """``host:port`` as a pair; an IPv6 host may stand in brackets."""
    host, separator, port = endpoint.rpartition(":")
    if not separator or not host or not port.isdecimal():
        raise ValueError(f"endpoint is {endpoint!r}; allowed: host:port")
    return host.strip("[]"), int(port)


def join_endpoint(host: str, port: int) -> str:
    """``host:port``, which :func:`split_endpoint` takes apart; an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def create_secret(run: RunDir) -> bytes:
    """The run's shared secret, made by its first attempt; readable by its owner only."""
    if not run.secret.exists():
        write_atomic(run.secret, secrets.token_hex(32) + "\n", mode=0o600)
    return read_secret(run)


def read_secret(run: RunDir) -> bytes:
    """The 32 bytes that authenticate this run's control messages."""
    return bytes.fromhex(run.secret.read_text(encoding="ascii"))
