"""Stands in for ``torchspec_hpc.transfer.control_server``: listens, and says so."""

from __future__ import annotations

import argparse
import signal
import socket

parser = argparse.ArgumentParser()
parser.add_argument("--host")
parser.add_argument("--port", type=int)
arguments = parser.parse_args()
with socket.create_server((arguments.host, arguments.port)) as server:
    print(f"READY {arguments.host}:{server.getsockname()[1]}", flush=True)
    signal.pause()
