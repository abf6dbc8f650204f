"""The control store: a TCPStore that serves until SIGTERM, or SIGINT where that is blocked.

The first and only line on standard output is ``READY host:port``.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys


def serve(host: str, port: int) -> None:
    """Serves on one address only, until SIGTERM or SIGINT.

    Args:
        host: Address to bind.
        port: Port to bind; 0 takes a free one.
    """
    stops = {signal.SIGTERM, signal.SIGINT}
    # the store's threads inherit the mask; what our parent had blocked is not meant for us
    stops -= signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    # left alone, TCPStore listens on every interface
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=4096)
    bound_port = int(listener.getsockname()[1])
    # seconds of import: only once the port is ours
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in __all__

    store = TCPStore(
        host,
        bound_port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    print(f"READY {host}:{bound_port}", flush=True)  # noqa: T201 - the caller reads it
    signal.sigwait(stops)
    del store


def main() -> None:
    """``python -m torchspec_hpc.transfer.control_server --host H --port P``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True, help="address to bind")
    parser.add_argument("--port", type=int, default=0, help="port to bind; 0: a free one")
    arguments = parser.parse_args()
    try:
        serve(arguments.host, arguments.port)
    except OSError as error:
        where = f"{arguments.host}:{arguments.port}"
        sys.exit(f"the control store cannot listen on {where}: {error.strerror}")


if __name__ == "__main__":
    main()
