from __future__ import annotations

import subprocess
import sys

from tests.services import Service


def test_it_listens_on_the_address_asked_for_only(control_service: Service) -> None:
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True)
    mine = [
        line.split()[3]
        for line in listening.stdout.splitlines()
        if f"pid={control_service.process.pid}," in line
    ]
    assert mine == [control_service.endpoint]


def test_a_port_in_use_is_one_clear_line(control_service: Service) -> None:
    port = control_service.endpoint.rpartition(":")[2]
    command = ["-m", "torchspec_hpc.transfer.control_server", "--host", "127.0.0.1"]
    ended = subprocess.run(
        [sys.executable, *command, "--port", port], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert f"the control store cannot listen on 127.0.0.1:{port}: Address already in use" in line
