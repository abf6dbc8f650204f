#!/usr/bin/env python3
"""Measure the way of hidden states from an engine to a trainer on this machine.

    python tools/bench_transfer.py [--sizes-mib 1 4 16 64] [--repeats 15]

Two processes, as in a run: this one is the trainer and owns the segment, a child is the engine.
Every repeat measures, one after the other and so under the same load:

======  ==========================================================================================
memcpy  a copy between two warm buffers: what no transfer can beat
socket  plain TCP over loopback between the two processes: what moves between processes here
put     the engine's ``HiddenStateStore.put`` into the trainer's segment
get     the trainer's ``HiddenStateStore.get_into`` from its own segment
feed    submit, put, receipt, get and remove, with a window of samples open at a time
======  ==========================================================================================

Medians in GB/s (1e9 bytes), ratios to the baseline of the same repeat, peak memory of both sides.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import resource
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
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
from torchspec_hpc.transfer.store import HiddenStateStore

MIB = 1024**2
HOST = "127.0.0.1"
SECRET = bytes(range(32))
#: SmolLM2-135M in float32: 3 aux layers and the last one, 9216 bytes a token
STATES, HIDDEN, ITEMSIZE = 4, 576, 4
TOKEN_BYTES = STATES * HIDDEN * ITEMSIZE


def main() -> None:
    """Runs the benchmark and prints its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes-mib", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--window", type=int, default=4, help="samples open at a time in the feed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    largest = max(arguments.sizes_mib) * MIB
    config = MooncakeConfig(global_segment_size=largest * (arguments.window + 2))
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        endpoints = _start_services(stack, config, logs)
        engine = Engine(endpoints, config, largest)
        stack.callback(engine.stop)
        trainer = HiddenStateStore.open(
            config, endpoints, segment_bytes=int(config.global_segment_size), deadline_s=30
        )
        stack.callback(trainer.close)
        bench = Bench(engine, trainer, largest)
        print("  MiB |  memcpy   socket |     put  /socket |     get  /memcpy")
        for size_mib in arguments.sizes_mib:
            print(_row(size_mib, bench.repeat(size_mib * MIB, arguments.repeats)), flush=True)
        print(f"\nfeed, window of {arguments.window}; a token is {TOKEN_BYTES} bytes")
        for size_mib in arguments.sizes_mib:
            num_tokens = size_mib * MIB // TOKEN_BYTES
            seconds = _feed(engine, trainer, endpoints, num_tokens, arguments)
            rate = num_tokens * TOKEN_BYTES / seconds / 1e9
            print(f"{size_mib:5d} | {rate:6.2f} GB/s  {num_tokens / seconds:12,.0f} tokens/s")
        segment_mib = int(config.global_segment_size) // MIB
        print(f"\npeak memory: trainer {_peak_mib():.0f} MiB, its segment {segment_mib} of them;")
        print(f"             engine {engine.peak_mib():.0f} MiB")


def _start_services(stack: ExitStack, config: MooncakeConfig, logs: Path) -> Endpoints:
    master = MooncakeMaster(HOST, config, logs)
    control = ControlStore(HOST, ControlConfig(), logs, control_server.__name__)
    for service in (master, control):
        service.start()
        stack.callback(service.stop)
    ready = [service.wait_ready(60, lambda: None) for service in (control, master)]
    return Endpoints("bench", 0, ready[0], ready[1], {node_name(): HOST})


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

    def peak_mib(self) -> float:
        """Largest resident size so far."""
        return self.order("peak")

    def stop(self) -> None:
        """Ends the process."""
        self.orders.send(("stop",))
        self._process.join(30)


def _engine_main(
    orders: Connection, endpoints: Endpoints, config: MooncakeConfig, largest: int
) -> None:
    torch.set_num_threads(1)
    store = HiddenStateStore.open(config, endpoints, segment_bytes=0, deadline_s=30)
    control = ControlClient(endpoints.control, SECRET, timeout_s=10)
    source = torch.randint(0, 256, (largest,), dtype=torch.uint8)
    listener = socket.create_server((HOST, 0))
    orders.send(listener.getsockname()[1])
    connection, _ = listener.accept()
    while (order := orders.recv())[0] != "stop":
        match order:
            case ("put", key, num_bytes, segment):
                answer = _seconds(functools.partial(store.put, key, source[:num_bytes], segment))
            case ("socket", num_bytes):
                answer = _seconds(functools.partial(_send, connection, source[:num_bytes]))
            case ("serve", num_samples):
                orders.send(0.0)
                for _ in range(num_samples):
                    _serve_one(control, store, source)
                answer = 0.0
            case _:
                answer = _peak_mib()
        orders.send(answer)
    store.close()


def _send(connection: socket.socket, source: torch.Tensor) -> None:
    connection.sendall(source.numpy().data)
    connection.recv(1)  # all of it has arrived


def _serve_one(control: ControlClient, store: HiddenStateStore, source: torch.Tensor) -> None:
    request = control.pop_request(30)
    assert request is not None
    num_tokens = len(request.tokens)
    states = source[: num_tokens * TOKEN_BYTES].view(torch.float32)
    store.put(request.key, states, request.segment)
    shape = (num_tokens, STATES, HIDDEN)
    control.push_reply(0, Receipt(request.ticket, request.key, shape, "float32", 0))


class Bench:
    """The single steps, timed in turn."""

    def __init__(self, engine: Engine, trainer: HiddenStateStore, largest: int) -> None:
        self._engine, self._trainer = engine, trainer
        self._socket = socket.create_connection((HOST, engine.port))
        self._source = torch.randint(0, 256, (largest,), dtype=torch.uint8)
        self._target = torch.zeros(largest, dtype=torch.uint8)
        trainer.register(self._target)

    def repeat(self, num_bytes: int, repeats: int) -> dict[str, list[float]]:
        """GB/s of every step, one value a repeat; the first repeat warms up."""
        rates: dict[str, list[float]] = defaultdict(list)
        source, target = self._source[:num_bytes], self._target[:num_bytes]
        for i in range(repeats + 1):
            key = f"bench/{num_bytes}/{i}"
            seconds = {
                "memcpy": _seconds(functools.partial(target.copy_, source)),
                "socket": self._receive(num_bytes),
                "put": self._engine.order("put", key, num_bytes, self._trainer.segment),
                "get": _seconds(functools.partial(self._trainer.get_into, key, target)),
            }
            self._trainer.remove(key)
            for step, value in seconds.items() if i else ():
                rates[step].append(num_bytes / value / 1e9)
        return rates

    def _receive(self, num_bytes: int) -> float:
        view = self._target[:num_bytes].numpy().data
        self._engine.orders.send(("socket", num_bytes))
        received = 0
        while received < num_bytes:
            received += self._socket.recv_into(view[received:])
        self._socket.sendall(b".")
        return float(self._engine.orders.recv())


def _feed(
    engine: Engine,
    trainer: HiddenStateStore,
    endpoints: Endpoints,
    num_tokens: int,
    arguments: argparse.Namespace,
) -> float:
    """Seconds a sample through the feed."""
    control = ControlClient(endpoints.control, SECRET, timeout_s=10)
    feed = HiddenStateFeed(control, trainer, 0, ControlConfig(), f"feed-{num_tokens}")
    tokens = np.arange(num_tokens, dtype=np.int32)
    num_samples = arguments.repeats + arguments.window
    engine.order("serve", num_samples)
    for i in range(arguments.window):
        feed.submit(str(i), tokens)
    times = []
    for i in range(num_samples):
        feed.take(str(i))
        times.append(time.perf_counter())
        if i + arguments.window < num_samples:
            feed.submit(str(i + arguments.window), tokens)
    engine.orders.recv()
    feed.close()
    control.close()
    warm = times[arguments.window - 1 :]
    return (warm[-1] - warm[0]) / (len(warm) - 1)


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _row(size_mib: int, rates: dict[str, list[float]]) -> str:
    median = {step: statistics.median(values) for step, values in rates.items()}

    def ratio(step: str, baseline: str) -> float:
        pairs = zip(rates[step], rates[baseline], strict=True)
        return statistics.median(rate / base for rate, base in pairs)

    return (
        f"{size_mib:5d} | {median['memcpy']:7.2f}  {median['socket']:7.2f} "
        f"| {median['put']:7.2f}  {ratio('put', 'socket'):7.2f} "
        f"| {median['get']:7.2f}  {ratio('get', 'memcpy'):7.2f}"
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
