"""One network namespace per virtual node, on a bridge of our own. Needs root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Network:
    """Addresses of the head (this machine) and of the nodes, and the nodes' namespaces."""

    head: str
    addresses: dict[str, str]
    namespaces: dict[str, str]


@contextmanager
def isolated_nodes(nodes: Sequence[str]) -> Iterator[Network]:
    """Every node has its own interface, loopback and port space; ``/etc/hosts`` names them."""
    tag, third = os.getpid(), os.getpid() % 254 + 1  # several clusters may live side by side
    prefix = f"10.213.{third}"
    network = Network(
        head=f"{prefix}.1",
        addresses={node: f"{prefix}.{i + 11}" for i, node in enumerate(nodes)},
        namespaces={node: f"ts{tag}-{node}" for node in nodes},
    )
    hosts = ["127.0.0.1 localhost", f"{network.head} {socket.gethostname()}"]
    hosts += [f"{address} {node}" for node, address in network.addresses.items()]
    bridge = f"tsbr{tag}"
    with ExitStack() as stack:
        _ip(f"link add {bridge} type bridge")
        stack.callback(_ip, f"link del {bridge}")
        _ip(f"addr add {network.head}/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        for i, (node, namespace) in enumerate(network.namespaces.items()):
            _ip(f"netns add {namespace}")
            stack.callback(_ip, f"netns del {namespace}")
            folder = Path("/etc/netns") / namespace  # `ip netns exec` mounts these over /etc
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder)
            (folder / "hosts").write_text("\n".join(hosts) + "\n")
            _ip(f"link add tsv{tag}-{i} type veth peer name eth0 netns {namespace}")
            _ip(f"link set tsv{tag}-{i} master {bridge} up")
            _ip(f"-n {namespace} link set lo up")
            _ip(f"-n {namespace} addr add {network.addresses[node]}/24 dev eth0")
            _ip(f"-n {namespace} link set eth0 up")
        yield network


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
