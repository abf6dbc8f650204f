"""A live line for a run in the foreground, read from its ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from torchspec_hpc.config import RunDir

_POLL_S = 1.0
_LINE_EVERY_S = 20.0


@contextlib.contextmanager
def watch_metrics(run: RunDir) -> Iterator[None]:
    """Shows the newest step while the body runs: live on a terminal, now and then in a log."""
    stop = threading.Event()
    console = Console()
    thread = threading.Thread(target=_watch, args=(run.metrics, stop, console), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _watch(path: Path, stop: threading.Event, console: Console) -> None:
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            while not stop.wait(_POLL_S):
                live.update(Text(newest_line(path)))
    else:
        shown = ""
        while not stop.wait(_LINE_EVERY_S):
            line = newest_line(path)
            if line != shown:
                console.print(line)
                shown = line


def newest_line(path: Path) -> str:
    """The last complete record, in one line; says so while there is none."""
    if not path.is_file():
        return "waiting for the first step: engine and trainers are starting"
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(json.JSONDecodeError):  # the last line may be half written
            return format_record(json.loads(line))
    return "waiting for the first step"


def format_record(record: dict[str, float | None]) -> str:
    """One step in one line."""
    parts = [f"step {record['step']}"]
    for key, label, form in (
        ("train/loss", "loss", ".3f"),
        ("train/accept_len", "accept len", ".2f"),
        ("throughput/train_tokens_per_s", "trainer tok/s", ".0f"),
        ("throughput/inference_tokens_per_s", "engine tok/s", ".0f"),
        ("throughput/wait_share", "waiting", ".0%"),
        ("throughput/mfu", "mfu", ".1%"),
    ):
        if record.get(key) is not None:  # null: the step's gradient was not finite
            parts.append(f"{label} {record[key]:{form}}")
    return "  ".join(parts)
