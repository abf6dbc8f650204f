"""The two services of an attempt: the Mooncake master and the control store.

Both keep everything in memory and nothing that outlives the attempt, so they are simply
killed at its end.
"""

from __future__ import annotations

import http.client
import logging
import os
import re
import shutil
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torchspec_hpc.config.endpoints import join_endpoint
from torchspec_hpc.config.ports import free_port, require_bindable
from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.transfer_schema import ControlConfig, MooncakeConfig
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError, UserError
from torchspec_hpc.slurm.processes import Child, shepherded, tail
from torchspec_hpc.slurm.steps import ServiceRuntime

logger = logging.getLogger(__name__)

#: Starts of a service whose port is ours to choose: another process may take a port between
#: our look at it and the service's own bind.
_MAX_STARTS = 3
_POLL_S = 0.05
_PROBE_S = 1.0
_KILL_S = 10.0
_HALF_WRITTEN_S = 120


class Service(ABC):
    """A server process on this node.

    Args:
        host: Address to bind, and by which others reach it.
        port: Port to bind; 0 takes a free one.
        port_key: The setting that gave the port, for errors.
        log: Its log file.
        runtime: What it runs in.
    """

    name: str

    def __init__(
        self, host: str, port: int, port_key: str, log: Path, runtime: ServiceRuntime
    ) -> None:
        self._host, self._port, self._port_key, self.log = host, port, port_key, log
        self._runtime = runtime
        self._child: Child | None = None
        self._num_starts = 0
        self.endpoint: str | None = None

    @abstractmethod
    def _command(self, port: int) -> list[str]:
        """The command line that serves on this port."""

    @abstractmethod
    def _answers(self) -> str | None:
        """``host:port`` once the service answers."""

    def start(self) -> None:
        """Starts the process; :meth:`wait_ready` says when it answers.

        Raises:
            UserError: The configured port or address cannot be bound.
        """
        require_bindable(self._host, self._port, self._port_key)
        self._num_starts += 1
        command = self._command(self._port or free_port(self._host))
        argv = shepherded(self._runtime.enter(command))
        self._child = Child(argv, self.log, os.environ)

    def wait_ready(self, deadline_s: float, check: Callable[[], object]) -> str:
        """Waits until the service answers.

        Args:
            deadline_s: Longest wait.
            check: Called while waiting; may raise.

        Returns:
            Its ``host:port``.

        Raises:
            TorchspecError: It ended instead.
            DeadlineExceeded: It does not answer.
        """
        start = time.monotonic()
        while (endpoint := self._answers()) is None:
            if (code := self.poll()) is not None:
                if self._port or self._num_starts == _MAX_STARTS:
                    raise TorchspecError(self._obituary(code))
                logger.warning("%s; starting it again", self._obituary(code))
                self.start()
            if time.monotonic() - start > deadline_s:
                raise DeadlineExceeded(
                    f"the {self.name} to answer (control.service_ready_s)",
                    deadline_s,
                    hint=f"its log {self.log} ends with:\n{tail(self.log)}",
                )
            check()
            time.sleep(_POLL_S)
        self.endpoint = endpoint
        logger.info("%s answers at %s", self.name, endpoint)
        return endpoint

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        assert self._child is not None
        return self._child.poll()

    def check(self) -> None:
        """Raises if the service has ended.

        Raises:
            TorchspecError: With the end of its log.
        """
        if (code := self.poll()) is not None:
            raise TorchspecError(self._obituary(code))

    def stop(self) -> None:
        """Kills it."""
        if self._child is not None:
            self._child.end(signal.SIGQUIT, _KILL_S)

    def _obituary(self, code: int) -> str:
        return f"the {self.name} ended with {code}; its log {self.log} ends with:\n{tail(self.log)}"


class MooncakeMaster(Service):
    """Knows where every object lies; holds no data itself."""

    name = "Mooncake master"

    def __init__(
        self,
        host: str,
        config: MooncakeConfig,
        logs: Path,
        runtime: ServiceRuntime = ServiceRuntime(),  # noqa: B008 - frozen
    ) -> None:
        log = logs / "mooncake_master.log"
        super().__init__(host, config.master_port, "mooncake.master_port", log, runtime)
        self._lease_ms = int(config.kv_lease_ttl_s * 1000)
        self._ports = (0, 0)

    def _command(self, port: int) -> list[str]:
        self._ports = (port, free_port(self._host, other_than=port))
        return [
            _mooncake_program(self._runtime),
            f"--rpc_address={self._host}",
            f"--rpc_port={self._ports[0]}",
            f"--metrics_host={self._host}",
            f"--metrics_port={self._ports[1]}",
            f"--default_kv_lease_ttl={self._lease_ms}",
            # what a killed engine has half written is freed after this or twice as long; no
            # living one writes for so long
            f"--put_start_release_timeout_sec={_HALF_WRITTEN_S}",
            "--logtostderr=1",
        ]

    def _answers(self) -> str | None:
        rpc, metrics = self._ports
        connection = http.client.HTTPConnection(self._host, metrics, timeout=_PROBE_S)
        try:
            connection.request("GET", "/health")
            healthy = connection.getresponse().status == http.client.OK
            socket.create_connection((self._host, rpc), _PROBE_S).close()
        except (OSError, http.client.HTTPException):  # not yet
            return None
        finally:
            connection.close()
        return join_endpoint(self._host, rpc) if healthy else None


class ControlStore(Service):
    """The TCPStore that carries requests, replies and heartbeats."""

    name = "control store"

    def __init__(
        self,
        host: str,
        config: ControlConfig,
        logs: Path,
        module: str,
        runtime: ServiceRuntime = ServiceRuntime(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(host, config.port, "control.port", logs / "control_store.log", runtime)
        self._module = module

    def start(self) -> None:
        """Starts the process, with an empty log: an old READY is not this server's."""
        self.log.unlink(missing_ok=True)
        super().start()

    def _command(self, port: int) -> list[str]:
        python = self._runtime.python
        return [python, "-m", self._module, "--host", self._host, "--port", str(port)]

    def _answers(self) -> str | None:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^READY (\S+)$", text, re.MULTILINE)
        return match[1] if match else None


class Services:
    """Both services of an attempt.

    Args:
        config: The run's settings.
        host: Address of this node.
        logs: Where their logs go.
        control_module: What runs as the control store.
        runtime: What both run in.
    """

    def __init__(
        self,
        config: Config,
        host: str,
        logs: Path,
        control_module: str,
        runtime: ServiceRuntime = ServiceRuntime(),  # noqa: B008 - frozen
    ) -> None:
        self.mooncake = MooncakeMaster(host, config.mooncake, logs, runtime)
        self.control = ControlStore(host, config.control, logs, control_module, runtime)
        self._ready_s = config.control.service_ready_s

    def start(self, check: Callable[[], object]) -> None:
        """Starts both and waits until both answer.

        Args:
            check: Called while waiting; may raise.

        Raises:
            UserError: A configured port or address cannot be bound.
            TorchspecError: One of them ended.
            DeadlineExceeded: One of them does not answer in time.
        """
        for service in (self.mooncake, self.control):
            service.start()
        for service in (self.mooncake, self.control):
            service.wait_ready(self._ready_s, check)

    def check(self) -> None:
        """Raises if one of them has ended.

        Raises:
            TorchspecError: With the end of its log.
        """
        self.mooncake.check()
        self.control.check()

    def stop(self) -> None:
        """Kills both."""
        self.mooncake.stop()
        self.control.stop()


def _mooncake_program(runtime: ServiceRuntime) -> str:
    if runtime.in_container:
        return "mooncake_master"
    beside = Path(runtime.python).with_name("mooncake_master")
    program = str(beside) if beside.is_file() else shutil.which("mooncake_master")
    if program is None:
        raise UserError(
            f"mooncake_master is installed neither beside {runtime.python} nor on the PATH",
            hint="pip install mooncake-transfer-engine (or -non-cuda), see tools/setup_env.sh",
        )
    return program
