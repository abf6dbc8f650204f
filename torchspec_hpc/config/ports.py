"""Ports of this node that a service may listen on."""

from __future__ import annotations

import errno
import socket

from torchspec_hpc.errors import UserError


def require_bindable(host: str, port: int, port_key: str) -> None:
    """Makes sure that a server may listen here.

    Raises:
        UserError: The port is taken, or the address is not this node's.
    """
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"{port_key} = {port}: the port is in use on {host}",
                hint="choose another port, or 0 for any free one",
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(
                f"{port_key} = {port}: we may not listen on that port",
                allowed="ports from 1024 on, or 0 for any free one",
            ) from error
        raise UserError(
            f"cannot listen on {host}: {error.strerror or error}",
            hint="set control.host to an address of the first inference node",
        ) from error


def free_port(host: str, other_than: int = 0) -> int:
    """A TCP port of an address of this node that was free a moment ago.

    Args:
        host: The address.
        other_than: A port that somebody is about to take.
    """
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port = int(probe.getsockname()[1])
        # asked again while this one is held, so the answer is another
        return free_port(host) if port == other_than else port


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
