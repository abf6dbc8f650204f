#!/usr/bin/env python3
"""Measure the way of hidden states from an engine to a trainer on this machine.

    python tools/bench_transfer.py [--sizes-kib 64 1024 4096 16384 65536] [--repeats 15]

Two processes, as in a run: this one is the trainer and owns the segment, a child is the engine.
Every repeat measures, one after the other and so under the same load:

=========  =======================================================================================
memcpy     a copy between two warm buffers: what no transfer can beat
shm        writing a file in /dev/shm, and reading it back
socket     plain TCP over loopback between the two processes: what moves between processes here
put, get   the engine's put into the trainer's segment, the trainer's get from there; and with the
           process of the other side, "own" for the trainer's own put, "far" for the engine's get
both       the way of a run: put by the engine, then get by the trainer
=========  =======================================================================================

Of each put and get there are three: Mooncake's own best (``raw``: registered memory, the bare
client), ``HiddenStateStore`` without (``ours``) and with checksums (``crc``).  The best of all
repeats in GB/s (1e9 bytes), since a median tells more of a busy machine's other work.  Then puts
by several threads at once, and the whole feed: submit, put, receipt, get and remove.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import resource
import socket
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from torchspec_hpc.config.endpoints import Endpoints, node_name
from torchspec_hpc.config.transfer_schema import ControlConfig, MooncakeConfig
from torchspec_hpc.slurm.services import ControlStore, MooncakeMaster
from torchspec_hpc.transfer import control_server
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.feed import HiddenStateFeed
from torchspec_hpc.transfer.messages import Receipt
from torchspec_hpc.transfer.mooncake_client import open_client
from torchspec_hpc.transfer.store import HiddenStateStore

KIB, MIB = 1024, 1024**2
HOST = "127.0.0.1"
SECRET = bytes(range(32))
WAYS = ("raw", "ours", "crc")
#: SmolLM2-135M in float32: 3 aux layers and the last one, 9216 bytes a token
STATES, HIDDEN, ITEMSIZE = 4, 576, 4
TOKEN_BYTES = STATES * HIDDEN * ITEMSIZE


def main() -> None:
    """Runs the benchmark and prints its tables."""
    options = _parse()
    torch.set_num_threads(1)
    largest = max(options.sizes_kib) * KIB
    config = MooncakeConfig(global_segment_size=max(largest, 16 * MIB) * (options.window + 2))
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoints = _start_services(stack, config, logs)
        engine = Engine(endpoints, config, largest)
        stack.callback(engine.stop)
        trainer = Side(endpoints, config, largest, int(config.global_segment_size))
        stack.callback(trainer.store.close)
        _print_steps(Bench(engine, trainer, largest), options)
        _print_threads(engine, trainer, options)
        print(f"\nfeed, window of {options.window}; a token is {TOKEN_BYTES} bytes")
        for size_kib in options.sizes_kib:
            num_tokens = max(1, size_kib * KIB // TOKEN_BYTES)
            seconds = _feed(engine, trainer.store, endpoints, num_tokens, options)
            rate = num_tokens * TOKEN_BYTES / seconds / 1e9
            print(f"{size_kib:6d} | {rate:6.2f} GB/s  {num_tokens / seconds:12,.0f} tokens/s")
        segment_mib = int(config.global_segment_size) // MIB
        print(f"\npeak memory: trainer {_peak_mib():.0f} MiB, its segment {segment_mib} of them;")
        print(f"             engine {engine.order('peak'):.0f} MiB")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [64, 256, 1024, 4096, 16384, 65536]
    parser.add_argument("--sizes-kib", type=int, nargs="+", default=sizes)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--window", type=int, default=4, help="samples open at a time in the feed")
    return parser.parse_args()


def _start_services(stack: ExitStack, config: MooncakeConfig, logs: Path) -> Endpoints:
    master = MooncakeMaster(HOST, config, logs)
    control = ControlStore(HOST, ControlConfig(), logs, control_server.__name__)
    for service in (master, control):
        service.start()
        stack.callback(service.stop)
    ready = [service.wait_ready(60, lambda: None) for service in (control, master)]
    return Endpoints("bench", 0, ready[0], ready[1], {node_name(): HOST})


class Side:
    """One process' client, used in all three ways, and a registered buffer."""

    def __init__(
        self, endpoints: Endpoints, config: MooncakeConfig, largest: int, segment_bytes: int
    ) -> None:
        client = open_client(config, endpoints, segment_bytes, 30)
        self.store = HiddenStateStore(client, config)
        checked = HiddenStateStore(client, config.model_copy(update={"checksum": True}))
        self._client, self._stores = client, {"ours": self.store, "crc": checked}
        self.buffer = torch.randint(0, 256, (largest,), dtype=torch.uint8)
        self.store.register(self.buffer)
        checked._registered.update(self.store._registered)  # noqa: SLF001 - one client, two views of it

    def put(self, way: str, key: str, num_bytes: int, segment: str) -> int | None:
        """Puts the beginning of the buffer; returns the checksum."""
        if way != "raw":
            return self._stores[way].put(key, self.buffer[:num_bytes], segment)
        from mooncake.store import ReplicateConfig

        placement = ReplicateConfig()
        placement.with_hard_pin = True
        placement.preferred_segment = segment
        code = self._client.put_from(key, self.buffer.data_ptr(), num_bytes, placement)
        assert code == 0, code
        return None

    def get(self, way: str, key: str, num_bytes: int, checksum: int | None) -> None:
        """Gets an object into the beginning of the buffer."""
        if way == "raw":
            assert self._client.get_into(key, self.buffer.data_ptr(), num_bytes) == num_bytes
        else:
            self._stores[way].get_into(key, self.buffer[:num_bytes], checksum)


class Engine:
    """The other process, which does what it is told."""

    def __init__(self, endpoints: Endpoints, config: MooncakeConfig, largest: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.orders, theirs = context.Pipe()
        self._process = context.Process(
            target=_engine_main, args=(theirs, endpoints, config, largest)
        )
        self._process.start()
        self.port = self.orders.recv()

    def order(self, *order: object) -> float:
        """Sends an order and waits for its answer: seconds, mostly."""
        self.orders.send(order)
        return float(self.orders.recv())

    def stop(self) -> None:
        """Ends the process."""
        self.orders.send(("stop",))
        self._process.join(30)


def _engine_main(
    orders: Connection, endpoints: Endpoints, config: MooncakeConfig, largest: int
) -> None:
    torch.set_num_threads(1)
    side = Side(endpoints, config, largest, segment_bytes=0)
    control = ControlClient(endpoints.control, SECRET, timeout_s=10)
    listener = socket.create_server((HOST, 0))
    orders.send(listener.getsockname()[1])
    connection, _ = listener.accept()
    while (order := orders.recv())[0] != "stop":
        match order:
            case ("put", *arguments):
                answer = _seconds(functools.partial(side.put, *arguments))
            case ("get", *arguments):
                answer = _seconds(functools.partial(side.get, *arguments))
            case ("puts", num_threads, *arguments):
                answer = _seconds(functools.partial(_puts, side, num_threads, *arguments))
            case ("socket", num_bytes):
                answer = _seconds(functools.partial(_send, connection, side.buffer[:num_bytes]))
            case ("serve", num_samples):
                orders.send(0.0)
                for _ in range(num_samples):
                    _serve_one(control, side)
                answer = 0.0
            case _:
                answer = _peak_mib()
        orders.send(answer)
    side.store.close()


def _puts(side: Side, num_threads: int, way: str, key: str, num_bytes: int, segment: str) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        # the list raises what a put has raised: a failed one must not count as fast
        list(
            pool.map(lambda i: side.put(way, f"{key}/{i}", num_bytes, segment), range(num_threads))
        )


def _send(connection: socket.socket, source: torch.Tensor) -> None:
    connection.sendall(source.numpy().data)
    connection.recv(1)  # all of it has arrived


def _serve_one(control: ControlClient, side: Side) -> None:
    request = control.pop_request(30)
    assert request is not None
    num_tokens = len(request.tokens)
    checksum = side.put("ours", request.key, num_tokens * TOKEN_BYTES, request.segment)
    shape = (num_tokens, STATES, HIDDEN)
    control.push_reply(0, Receipt(request.ticket, request.key, shape, "float32", 0, checksum))


class Bench:
    """The single steps, timed in turn."""

    def __init__(self, engine: Engine, trainer: Side, largest: int) -> None:
        self._engine, self._trainer = engine, trainer
        self._socket = socket.create_connection((HOST, engine.port))
        self._source = torch.randint(0, 256, (largest,), dtype=torch.uint8)
        self._target = torch.zeros(largest, dtype=torch.uint8)

    def repeat(self, num_bytes: int, repeats: int) -> dict[str, list[float]]:
        """GB/s of every step, one value a repeat; the first repeat warms up."""
        rates: dict[str, list[float]] = defaultdict(list)
        for i in range(repeats + 1):
            seconds = self._baselines(num_bytes)
            for way in WAYS:
                seconds |= self._store(way, f"bench/{num_bytes}/{i}/{way}", num_bytes)
            for step, value in seconds.items() if i else ():
                rates[step].append(num_bytes / value / 1e9)
        return rates

    def _baselines(self, num_bytes: int) -> dict[str, float]:
        source, target = self._source[:num_bytes], self._target[:num_bytes]
        path = Path(f"/dev/shm/bench_transfer.{os.getpid()}")  # noqa: S108 - memory, not a file
        seconds = {
            "memcpy": _seconds(functools.partial(target.copy_, source)),
            "shm write": _seconds(functools.partial(path.write_bytes, source.numpy().data)),
            "shm read": _seconds(lambda: path.open("rb").readinto(target.numpy().data)),
            "socket": self._receive(num_bytes),
        }
        path.unlink()
        return seconds

    def _store(self, way: str, key: str, num_bytes: int) -> dict[str, float]:
        store, segment = self._trainer.store, self._trainer.store.segment
        checksum = self._trainer.put(way, f"{key}/sum", num_bytes, segment)
        self._trainer.get("raw", f"{key}/sum", num_bytes, None)
        seconds = {
            f"put {way}": self._engine.order("put", way, key, num_bytes, segment),
            f"own {way}": _seconds(
                functools.partial(self._trainer.put, way, f"{key}/own", num_bytes, segment)
            ),
            f"get {way}": _seconds(
                functools.partial(self._trainer.get, way, f"{key}/sum", num_bytes, checksum)
            ),
            f"far {way}": self._engine.order("get", way, f"{key}/sum", num_bytes, checksum),
        }
        seconds[f"both {way}"] = seconds[f"put {way}"] + seconds[f"get {way}"]
        for suffix in ("", "/sum", "/own"):
            store.remove(f"{key}{suffix}")
        return seconds

    def _receive(self, num_bytes: int) -> float:
        view = self._target[:num_bytes].numpy().data
        self._engine.orders.send(("socket", num_bytes))
        received = 0
        while received < num_bytes:
            received += self._socket.recv_into(view[received:])
        self._socket.sendall(b".")
        return float(self._engine.orders.recv())


def _print_steps(bench: Bench, options: argparse.Namespace) -> None:
    names = ("put", "get", "both", "own", "far")
    print("   KiB |  memcpy shm write  read  socket |" + "".join(
        f" {name}:  raw  ours   crc  ours/raw crc/raw |" for name in names
    ))  # fmt: skip
    for size_kib in options.sizes_kib:
        rates = bench.repeat(size_kib * KIB, options.repeats)
        best = {step: max(values) for step, values in rates.items()}
        line = (
            f"{size_kib:6d} | {best['memcpy']:7.2f} {best['shm write']:9.2f} "
            f"{best['shm read']:5.2f} {best['socket']:7.2f} |"
        )
        for name in names:
            raw, ours, crc = (best[f"{name} {way}"] for way in WAYS)
            line += f"     {raw:5.2f} {ours:5.2f} {crc:5.2f}  {ours / raw:8.2f} {crc / raw:7.2f} |"
        print(line, flush=True)


def _print_threads(engine: Engine, trainer: Side, options: argparse.Namespace) -> None:
    print("\nputs by threads at once, GB/s of all together\n   KiB threads |   raw  ours   crc")
    for size_kib in [size for size in options.sizes_kib if size in (1024, 16384)]:
        for num_threads in options.threads:
            line = f"{size_kib:6d} {num_threads:7d} |"
            for way in WAYS:
                seconds = []
                for i in range(options.repeats + 1):
                    key = f"threads/{size_kib}/{num_threads}/{way}/{i}"
                    arguments = (way, key, size_kib * KIB, trainer.store.segment)
                    seconds.append(engine.order("puts", num_threads, *arguments))
                    for thread in range(num_threads):
                        trainer.store.remove(f"{key}/{thread}")
                total = num_threads * size_kib * KIB
                line += f" {total / min(seconds[1:]) / 1e9:5.2f}"
            print(line, flush=True)


def _feed(
    engine: Engine,
    trainer: HiddenStateStore,
    endpoints: Endpoints,
    num_tokens: int,
    options: argparse.Namespace,
) -> float:
    """Seconds a sample through the feed."""
    control = ControlClient(endpoints.control, SECRET, timeout_s=10)
    feed = HiddenStateFeed(control, trainer, 0, ControlConfig(), f"feed-{num_tokens}")
    tokens = np.arange(num_tokens, dtype=np.int32)
    num_samples = options.repeats + options.window
    engine.order("serve", num_samples)
    for i in range(options.window):
        feed.submit(str(i), tokens)
    times = []
    for i in range(num_samples):
        feed.take(str(i))
        times.append(time.perf_counter())
        if i + options.window < num_samples:
            feed.submit(str(i + options.window), tokens)
    engine.orders.recv()
    feed.close()
    control.close()
    warm = times[options.window - 1 :]
    return (warm[-1] - warm[0]) / (len(warm) - 1)


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
