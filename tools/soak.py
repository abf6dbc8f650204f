#!/usr/bin/env python3
"""Ask real engines for very many small samples and watch every process's memory.

    python tools/soak.py --model DIR [--requests 100000] [--minutes 30] [--kill-every 60]

The services, the engines under their shepherds and the trainer's feed are those of a run; the
engines use Transformers, so DIR should be a tiny model.  ``--kill-every`` kills an engine every so
many seconds, in turn.  Printed at intervals: requests so far, resident MiB of this process (the
trainer), of all engines together, of the control store and of the Mooncake master, and what the
master says the store holds.  In the end nothing may be left in it: exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchspec_hpc.config import Config, RunDir, parse_config, save_config
from torchspec_hpc.config.endpoints import Endpoints, create_secret, read_secret
from torchspec_hpc.slurm.local import LocalLauncher
from torchspec_hpc.slurm.services import Services
from torchspec_hpc.slurm.shepherd import descendants
from torchspec_hpc.slurm.steps import Step
from torchspec_hpc.transfer.control import ControlClient
from torchspec_hpc.transfer.feed import GaveUp, HiddenStateFeed
from torchspec_hpc.transfer.store import HiddenStateStore

READY_S = 300.0
#: After the last answer: so long may it take to free what a killed engine had half written.
SETTLE_S = 300.0
WORKERS = {
    "engines": "torchspec_hpc.inference.worker",
    "control": "torchspec_hpc.transfer.control_server",
    "master": "mooncake_master",
}


def main() -> None:
    """Runs the soak and prints its table."""
    options = parse_options()
    logging.basicConfig(level=logging.ERROR)  # every kill is worth many warnings
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        run = RunDir(Path(folder) / "run")
        run.create()
        config = make_config(options, Path(folder))
        save_config(config, run.config)
        with started(run, config) as scene:
            try:
                soak(options, scene)
            except GaveUp:
                sys.exit(f"the engines have ended:\n{scene.engines.log_tail()}")
            left = wait_empty(scene.metrics)
    print(f"left in the store: {left}")
    sys.exit(bool(left["keys"]))


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="target directory")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--requests", type=int, default=100_000, help="stop after so many")
    parser.add_argument("--minutes", type=float, default=30.0, help="or after so long")
    parser.add_argument("--window", type=int, default=64, help="open requests")
    parser.add_argument("--max-tokens", type=int, default=32, help="samples have 1 to so many")
    parser.add_argument("--kill-every", type=float, default=0.0, help="seconds; 0: never")
    parser.add_argument("--interval", type=float, default=30.0, help="seconds between lines")
    return parser.parse_args()


def make_config(options: argparse.Namespace, folder: Path) -> Config:
    """A run on this machine with short deadlines."""
    settings = {
        "run_name": "run",
        "output_dir": str(folder),
        "model": {"target_model_path": options.model},
        "dataset": {"train_data_path": __file__},  # some file
        "training": {"max_seq_length": options.max_tokens},
        "inference": {
            "engine": "hf",
            "aux_hidden_states_layers": [1],
            "inference_num_gpus": options.engines,
            "inference_num_gpus_per_node": options.engines,
            "num_threads": 1,
        },
        "mooncake": {"global_segment_size": "256MiB", "local_buffer_size": "64MiB"},
        "control": {"heartbeat_s": 1, "request_deadline_s": 30, "engine_restarts": 1000},
    }
    return parse_config(settings, base_dir=folder, source="tools/soak.py")


@dataclass
class Scene:
    """What runs.

    Attributes:
        feed: The trainer's.
        engines: All of them.
        metrics: Address of the master's page.
    """

    feed: HiddenStateFeed
    engines: Step
    metrics: str


@contextmanager
def started(run: RunDir, config: Config) -> Iterator[Scene]:
    """Services, engines and a feed; all ended in the end."""
    launcher = LocalLauncher(run, config, os.environ)
    logs = run.attempt_logs(0)
    logs.mkdir(parents=True)
    services = Services(config, launcher.host, logs, launcher.modules.control_store)
    try:
        services.start(check=lambda: None)
        assert services.control.endpoint
        assert services.mooncake.endpoint
        create_secret(run)
        endpoints = Endpoints(
            run.run_id, 0, services.control.endpoint, services.mooncake.endpoint,
            launcher.addresses,
        )  # fmt: skip
        endpoints.write(run)
        engines = launcher.start_inference(logs)
        control = ControlClient(endpoints.control, read_secret(run), READY_S)
        segment_bytes = int(config.mooncake.global_segment_size)
        store = HiddenStateStore.open(
            config.mooncake, endpoints, segment_bytes=segment_bytes, deadline_s=READY_S
        )
        feed = HiddenStateFeed(control, store, 0, config.control, endpoints.attempt_id)
        try:
            yield Scene(feed, engines, metrics_address())
        finally:
            feed.close()
            engines.kill()
            store.close()
            control.close()
    finally:
        services.stop()


def soak(options: argparse.Namespace, scene: Scene) -> None:
    """Keeps a window of requests open, kills engines, and prints a line now and then."""
    random = np.random.default_rng(0)
    print("    s  requests  again | trainer  engines  control  master MiB |   keys      bytes")
    start = told = killed = time.monotonic()
    num_sent = num_taken = num_kills = 0
    while num_taken < num_sent or not num_sent:
        now = time.monotonic()
        is_over = num_sent >= options.requests or now - start > 60 * options.minutes
        while not is_over and num_sent - num_taken < options.window:
            tokens = random.integers(0, 100, random.integers(1, options.max_tokens + 1))
            scene.feed.submit(str(num_sent), tokens.astype(np.int32))
            num_sent += 1
        scene.feed.take(str(num_taken), give_up=lambda: scene.engines.poll() is not None)
        num_taken += 1
        if options.kill_every and now - killed > options.kill_every:
            engines = workers()["engines"]
            if len(engines) == options.engines:
                os.kill(engines[num_kills % options.engines], signal.SIGKILL)
                num_kills, killed = num_kills + 1, now
        if now - told > options.interval:
            told = now
            print_line(now - start, num_taken, scene)
    print_line(time.monotonic() - start, num_taken, scene)
    print(f"{num_taken / (time.monotonic() - start):.0f} requests/s, {num_kills} kills")


def print_line(elapsed_s: float, num_taken: int, scene: Scene) -> None:
    """One line of the table."""
    found = workers()
    sizes = {name: sum(map(resident_mib, pids)) for name, pids in found.items()}
    held = store_content(scene.metrics)
    print(
        f"{elapsed_s:5.0f} {num_taken:9d} {scene.feed.stats().num_retries:6d} | "
        f"{resident_mib(os.getpid()):7.0f}  {sizes['engines']:7.0f}  {sizes['control']:7.0f}  "
        f"{sizes['master']:6.0f}     | {held['keys']:6.0f} {held['bytes']:10.0f}",
        flush=True,
    )


def workers() -> dict[str, list[int]]:
    """Process ids below this process, without those of shepherds."""
    found: dict[str, list[int]] = {name: [] for name in WORKERS}
    for pid in descendants(os.getpid()):
        words = command_line(pid)
        for name, program in WORKERS.items():
            if "--" not in words and any(word.endswith(program) for word in words[:3]):
                found[name].append(pid)
    return found


def command_line(pid: int) -> list[str]:
    """Its words; none where it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
    except OSError:
        return []


def resident_mib(pid: int) -> float:
    """Resident size; 0 where it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def metrics_address() -> str:
    """Where the Mooncake master below this process tells of itself."""
    (master,) = workers()["master"]
    flags = dict(word.lstrip("-").split("=", 1) for word in command_line(master) if "=" in word)
    return f"http://{flags['metrics_host']}:{flags['metrics_port']}/metrics"


def store_content(metrics: str) -> dict[str, float]:
    """Number of keys and allocated bytes."""
    with urllib.request.urlopen(metrics, timeout=10) as answer:  # noqa: S310 - http, ours
        text = answer.read().decode()
    names = {"keys": "master_key_count", "bytes": "master_allocated_bytes"}
    found = {}
    for short, name in names.items():
        match = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert match, f"{metrics} says nothing of {name}"
        found[short] = float(match[1])
    return found


def wait_empty(metrics: str) -> dict[str, float]:
    """What the store holds when everything has been taken, after a while for late writers."""
    deadline = time.monotonic() + SETTLE_S
    while (held := store_content(metrics))["keys"] and time.monotonic() < deadline:
        time.sleep(1)
    return held


if __name__ == "__main__":
    main()
