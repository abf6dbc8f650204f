"""Addresses of this machine's network interfaces, from the kernel (Linux)."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from torchspec_hpc.errors import UserError

#: ioctl that tells the IPv4 address of an interface (netdevice(7)).
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15
_IF_INET6 = Path("/proc/net/if_inet6")
#: Scope of addresses that other networks reach, in that file.
_GLOBAL_SCOPE = "00"


def interface_address(name: str) -> str:
    """The address of an interface: IPv4 if it has one, else a global IPv6 one.

    Raises:
        UserError: There is no such interface here, or it has no address.
    """
    known = [known_name for _, known_name in socket.if_nameindex()]
    if name not in known:
        raise UserError(
            f"slurm.network_interface = {name}: {socket.gethostname()} has no such interface",
            allowed=", ".join(known),
        )
    address = _ipv4(name) or _ipv6(name)
    if address is None:
        raise UserError(
            f"slurm.network_interface = {name}: it has no address on {socket.gethostname()}",
            hint="ip -br addr shows which interface has one",
        )
    return address


def _ipv4(name: str) -> str | None:
    request = struct.pack("256s", name.encode()[:_NAME_BYTES])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])


def _ipv6(name: str) -> str | None:
    """Lines are ``address index prefix scope flags name``, all hexadecimal."""
    if not _IF_INET6.is_file():
        return None
    for line in _IF_INET6.read_text(encoding="ascii").splitlines():
        digits, _, _, scope, _, interface = line.split()
        if interface == name and scope == _GLOBAL_SCOPE:
            return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return None
