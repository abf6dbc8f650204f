#!/usr/bin/env python3
"""Measure the control store with as many clients as a large run has.

    python tools/bench_control.py [--engines 512] [--trainers 256] [--seconds 20]

Every simulated rank has its own connection to one real control store and does what a real rank
does there: an engine polls for requests, tells who asked that it has one, waits for
``--serve-ms``, pushes a receipt and sends heartbeats; a trainer keeps a window of requests open
and asks again where an engine is gone.  No hidden states are moved.  Three phases:

1. idle: nobody asks for anything;
2. load: tickets per second, and the time from a request to its receipt;
3. death: one of ten processes of engines is killed. How long until every request that was open
   then has been answered?

The clients need far more CPU than the server. Where they fill the machine, its CPU time per
ticket tells how many tickets one core of a node of its own could serve.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.holders import Holders
from torchspec_hpc.transfer.messages import Receipt, Request, encode_tokens

HOST = "127.0.0.1"
SECRET = bytes(range(32))
NUM_ENGINE_PROCESSES, NUM_TRAINER_PROCESSES = 10, 4
HEARTBEAT_S = 5.0
READY_S, DRAIN_S = 300.0, 120.0


@dataclass
class Samples:
    """What the trainers of one process saw.

    Attributes:
        times: Of every ticket: first asked for, answered (monotonic seconds).
        num_retries: Requests sent again.
    """

    times: list[tuple[float, float]] = field(default_factory=list)
    num_retries: int = 0


def main() -> None:
    """Runs the phases and prints what was measured."""
    options = parse_options()
    server = subprocess.Popen(
        [sys.executable, "-m", "torchspec_hpc.transfer.control_server", "--host", HOST],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    endpoint = server.stdout.readline().split()[1]
    try:
        measure(options, endpoint, server.pid)
    finally:
        server.kill()


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, default=512)
    parser.add_argument("--trainers", type=int, default=256)
    parser.add_argument("--window", type=int, default=8, help="open requests of a trainer")
    parser.add_argument("--tokens", type=int, default=1024, help="of a request")
    parser.add_argument("--serve-ms", type=float, default=0.0, help="an engine works on a request")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each phase")
    return parser.parse_args()


def measure(options: argparse.Namespace, endpoint: str, server: int) -> None:
    """All phases."""
    engines = [
        Group(engine_group, endpoint, ranks, options)
        for ranks in shares(options.engines, NUM_ENGINE_PROCESSES)
    ]
    trainers = [
        Group(trainer_group, endpoint, ranks, options)
        for ranks in shares(options.trainers, NUM_TRAINER_PROCESSES)
    ]
    for group in engines + trainers:
        group.wait_ready()
    print(f"{options.engines} engines, {options.trainers} trainers, on {os.cpu_count()} cores")
    before = cpu_s(server)
    time.sleep(options.seconds)
    print(f"idle:  server {100 * (cpu_s(server) - before) / options.seconds:.0f} % of a core")

    for group in trainers:
        group.order("ask")
    time.sleep(options.seconds / 4)  # warm
    start, before = time.monotonic(), cpu_s(server)
    time.sleep(options.seconds)
    end, used = time.monotonic(), cpu_s(server) - before
    killed = time.monotonic()
    engines[0].kill()
    time.sleep(options.seconds)
    for group in trainers:
        group.order("stop")
    samples = [group.result() for group in trainers]
    for group in engines[1:] + trainers:
        group.kill()
    report(samples, start, end, used, killed)


def report(samples: list[Samples], start: float, end: float, used: float, killed: float) -> None:
    """Prints the figures of load and death."""
    times = [pair for sample in samples for pair in sample.times]
    latencies = sorted(1000 * (b - a) for a, b in times if a >= start and b < end)
    num = sum(start <= b < end for _, b in times)
    cuts = [latencies[len(latencies) * percent // 100] for percent in (50, 90, 99)]
    print(
        f"load:  {num / (end - start):,.0f} tickets/s; request to receipt in ms: 50 % {cuts[0]:.0f}"
    )
    print(f"       90 % {cuts[1]:.0f}, 99 % {cuts[2]:.0f}, all {latencies[-1]:.0f}")
    print(f"       server {100 * used / (end - start):.0f} % of a core, {1e6 * used / num:.0f} us")
    print(f"       a ticket: {num / used:,.0f} tickets/s would fill a core")
    hit = [b - killed for a, b in times if a < killed < b]
    retries = sum(sample.num_retries for sample in samples)
    print(
        f"death: {len(hit)} requests were open, {retries} were asked again; the last was answered"
    )
    print(f"       after {max(hit):.1f} s; engines send a heartbeat every {HEARTBEAT_S:.0f} s")


class Group:
    """A process with a share of the ranks, a thread each."""

    def __init__(self, target, endpoint: str, ranks: range, options: argparse.Namespace) -> None:  # noqa: ANN001 - one of the two below
        context = multiprocessing.get_context("fork")  # torch is imported once
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, endpoint, ranks, options))
        self._process.start()

    def wait_ready(self) -> None:
        """Waits until all its ranks are connected."""
        assert self._pipe.poll(READY_S), "a process of ranks does not get ready"
        self._pipe.recv()

    def order(self, word: str) -> None:
        """Tells it what to do."""
        self._pipe.send(word)

    def result(self) -> Samples:
        """What trainers saw, once they have stopped."""
        assert self._pipe.poll(DRAIN_S), "a trainer does not get its answers"
        found = self._pipe.recv()
        assert isinstance(found, Samples)
        return found

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.join()


def engine_group(
    pipe: Connection, endpoint: str, ranks: range, options: argparse.Namespace
) -> None:
    """Runs engines until the process is killed."""
    clients = [ControlClient(endpoint, SECRET, timeout_s=READY_S) for _ in ranks]
    for rank, control in zip(ranks, clients, strict=True):
        threading.Thread(target=engine, args=(control, rank, options.serve_ms / 1000)).start()
    pipe.send("ready")
    pipe.recv()


def engine(control: ControlClient, rank: int, serve_s: float) -> None:
    """One engine."""
    due = 0.0
    while True:
        if time.monotonic() >= due:
            control.heartbeat("inference", rank, {"ready": True})
            due = time.monotonic() + HEARTBEAT_S
        if (request := control.pop_request(0.5)) is not None:
            time.sleep(serve_s)
            shape = (len(request.tokens), 4, 4096)
            receipt = Receipt(request.ticket, request.key, shape, "bfloat16", rank)
            control.push_reply(request.reply_to, receipt)


def trainer_group(
    pipe: Connection, endpoint: str, ranks: range, options: argparse.Namespace
) -> None:
    """Runs trainers from the order to ask to the order to stop."""
    clients = [ControlClient(endpoint, SECRET, timeout_s=READY_S) for _ in ranks]
    pipe.send("ready")
    pipe.recv()
    samples, stop = Samples(), threading.Event()
    threads = [
        threading.Thread(target=Trainer(control, rank, options, samples).run, args=(stop,))
        for rank, control in zip(ranks, clients, strict=True)
    ]
    for thread in threads:
        thread.start()
    pipe.recv()
    stop.set()
    for thread in threads:
        thread.join()
    pipe.send(samples)
    pipe.recv()


class Trainer:
    """One trainer: a window of open requests."""

    def __init__(
        self, control: ControlClient, rank: int, options: argparse.Namespace, samples: Samples
    ) -> None:
        self._control, self._rank, self._window = control, rank, options.window
        self._samples = samples
        self._tokens = encode_tokens(np.arange(options.tokens, dtype=np.int32))
        self._holders = Holders(control, rank, HEARTBEAT_S)
        self._asked: dict[str, float] = {}  # ticket -> when first
        self._current: dict[str, tuple[str, int]] = {}  # key -> ticket, place
        self._serial = 0

    def run(self, stop: threading.Event) -> None:
        """Asks until it is stopped, and waits for what is open then."""
        while self._asked or not stop.is_set():
            while len(self._asked) < self._window and not stop.is_set():
                ticket = str(self._serial)
                self._asked[ticket] = time.monotonic()
                self._send(ticket)
            reply = self._control.pop_reply(self._rank, 0.05)
            if reply is not None and self._current.pop(reply.key, None) is not None:
                self._samples.times.append((self._asked.pop(reply.ticket), time.monotonic()))
            places = {key: place for key, (_, place) in self._current.items()}
            for key in self._holders.lost(places):
                self._samples.num_retries += 1
                self._send(self._current.pop(key)[0])

    def _send(self, ticket: str) -> None:
        key = f"bench.0/{self._rank}/{self._serial}"
        self._serial += 1
        request = Request(ticket, 0, self._rank, "segment", key, self._tokens)
        self._current[key] = ticket, self._control.push_request(request)


def shares(num: int, num_parts: int) -> list[range]:
    """0..num cut into parts."""
    cuts = [num * i // num_parts for i in range(num_parts + 1)]
    return [range(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
