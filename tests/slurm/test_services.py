"""Starting the real Mooncake master and control store, and what can go wrong."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers import command_lines, free_port
from torchspec_hpc.config import ports
from torchspec_hpc.config.endpoints import split_endpoint
from torchspec_hpc.config.ports import require_bindable
from torchspec_hpc.config.transfer_schema import ControlConfig, MooncakeConfig
from torchspec_hpc.errors import DeadlineExceeded, TorchspecError, UserError
from torchspec_hpc.slurm.processes import Child, shepherded
from torchspec_hpc.slurm.services import ControlStore, MooncakeMaster
from torchspec_hpc.slurm.steps import ServiceRuntime

HOST = "127.0.0.1"
FAKE_CONTROL = "tests.slurm.fake_workers.control_store"


def nothing() -> None:
    """Nobody interrupts."""


class Silent(MooncakeMaster):
    """A master that starts, and never answers."""

    def _command(self, port: int) -> list[str]:
        super()._command(port)
        return [sys.executable, "-c", "print('looking for my config'); import time; time.sleep(99)"]


class Broken(MooncakeMaster):
    """A master that ends at once; it finds its port taken the first time only."""

    def _command(self, port: int) -> list[str]:
        command = super()._command(port)
        return command if self._num_starts > 1 else [sys.executable, "-c", "raise SystemExit('no')"]


@pytest.mark.parametrize("address", [HOST, "::1"])
def test_the_master_answers_on_a_port_of_its_own_choice(tmp_path: Path, address: str) -> None:
    master = MooncakeMaster(address, MooncakeConfig(), tmp_path)
    master.start()
    host, port = split_endpoint(master.wait_ready(20, nothing))
    assert host == address
    socket.create_connection((host, port), timeout=1).close()
    assert master.poll() is None
    master.stop()
    assert master.poll() is not None
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((host, port), timeout=1)


def test_services_take_the_configured_ports(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    master = MooncakeMaster(HOST, MooncakeConfig(master_port=ports[0]), tmp_path)
    control = ControlStore(HOST, ControlConfig(port=ports[1]), tmp_path, FAKE_CONTROL)
    for service, port in zip((master, control), ports, strict=True):
        service.start()
        assert service.wait_ready(20, nothing) == f"{HOST}:{port}"
        service.stop()


def test_sigterm_is_not_for_services(tmp_path: Path) -> None:
    """Slurm sends it to every process of a job whose trainers still need them."""
    master = MooncakeMaster(HOST, MooncakeConfig(), tmp_path)
    master.start()
    master.wait_ready(20, nothing)
    for pid in processes_with(f"--rpc_port={master.endpoint.split(':')[1]}"):
        os.kill(pid, signal.SIGTERM)
    assert master._child.wait(1) is None
    assert master._answers()
    master.stop()


def test_a_silent_service_is_given_up_in_time(tmp_path: Path) -> None:
    master = Silent(HOST, MooncakeConfig(), tmp_path)
    master.start()
    with pytest.raises(DeadlineExceeded, match=r"(?s)Mooncake master .*looking for my config"):
        master.wait_ready(3, nothing)
    master.stop()


def test_a_port_that_was_taken_meanwhile_is_not_the_end(tmp_path: Path) -> None:
    master = Broken(HOST, MooncakeConfig(), tmp_path)
    master.start()
    assert master.wait_ready(20, nothing)
    master.stop()


def test_a_service_that_ends_shows_its_log(tmp_path: Path) -> None:
    control = ControlStore(HOST, ControlConfig(), tmp_path, "no.such.module")
    control.start()
    with pytest.raises(TorchspecError, match=r"(?s)control store ended with 1.*no.such.module"):
        control.wait_ready(20, nothing)


def test_two_servers_of_a_service_get_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([50831, 50831, 50832])  # the kernel may name a port that nobody has taken again

    class Probe(socket.socket):
        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", next(given)

    monkeypatch.setattr(socket, "socket", Probe)
    port = ports.free_port("127.0.0.1")
    assert ports.free_port("127.0.0.1", other_than=port) == 50832


def test_ports_that_cannot_be_bound() -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"control.port = {port}: the port is in use"):
            require_bindable(HOST, port, "control.port")
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1"):
        require_bindable("192.0.2.1", 0, "control.port")


def test_a_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = ServiceRuntime(python=str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="mooncake_master is installed neither"):
        MooncakeMaster(HOST, MooncakeConfig(), tmp_path, runtime).start()


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 3", 3), ("kill -9 $$", 137), ("setsid sleep 97531 & exit 4", 4)],
)
def test_a_shepherd_ends_as_its_command_and_buries_it(
    tmp_path: Path, script: str, code: int
) -> None:
    child = Child(shepherded(["sh", "-c", script]), tmp_path / "log", os.environ)
    assert child.wait(20) == code
    assert not processes_with("97531")


def test_a_shepherd_turns_sigterm_into_the_stop_file(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    code = "import signal, os; signal.signal(15, lambda *_: os._exit(5)); print('up', flush=True)"
    command = [sys.executable, "-c", f"{code}; signal.pause()"]  # has a handler, as torchrun
    child = Child(shepherded(command, f"--stop-file={stop}"), tmp_path / "log", os.environ)
    while "up" not in (tmp_path / "log").read_text():
        assert child.wait(0.02) is None
    for pid in processes_with(code):  # every process, as Slurm does
        os.kill(pid, signal.SIGTERM)
    while not stop.exists():
        assert child.wait(0.02) is None
    assert child.wait(0.2) is None
    child.end(signal.SIGQUIT, 10)
    assert child.poll() == 137
    assert not processes_with(code)


def test_a_shepherd_says_what_cannot_be_started(tmp_path: Path) -> None:
    child = Child(shepherded(["/no/program"]), tmp_path / "log", os.environ)
    assert child.wait(20) == 127
    assert "cannot start /no/program: No such file" in (tmp_path / "log").read_text()


def test_a_shepherd_starts_its_command_again_and_takes_its_ready_file_away(tmp_path: Path) -> None:
    ready = tmp_path / "ready_8"
    script = f"echo start {{rank}} >> {tmp_path}/starts; test -e {ready} && exit 9; touch {ready}"
    options = ["--restarts=1", "--first-rank=5", f"--ready-file={tmp_path}/ready_{{rank}}"]
    command = shepherded(["sh", "-c", f"{script}; exit 7"], *options)
    child = Child(command, tmp_path / "log", {**os.environ, "SLURM_PROCID": "3"})
    assert child.wait(20) == 7
    assert (tmp_path / "starts").read_text() == "start 8\n" * 2
    assert not ready.exists()
    assert "sh -c" in (tmp_path / "log").read_text()
    assert "ended with 7; restart 1 of 1 in 1 s" in (tmp_path / "log").read_text()


def test_a_shepherd_that_was_told_to_end_starts_nothing_again(tmp_path: Path) -> None:
    script = f"echo start >> {tmp_path}/starts; exit 7"
    child = Child(shepherded(["sh", "-c", script], "--restarts=99"), tmp_path / "log", os.environ)
    while "restart 2" not in (tmp_path / "log").read_text():
        assert child.wait(0.02) is None
    child.signal(signal.SIGINT)
    assert child.wait(20) == 7
    assert (tmp_path / "starts").read_text() == "start\n" * 2


def processes_with(word: str) -> list[int]:
    lines = command_lines().items()
    return [process for process, words in lines if any(word in w for w in words)]
