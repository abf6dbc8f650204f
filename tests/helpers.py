"""Small things that several tests need."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_lines() -> dict[int, list[str]]:
    """Words of the command of every process, by its id; the last word is empty."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            found[int(path.parent.name)] = path.read_text().split("\0")
    return found


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def conversations(num: int) -> list[dict[str, Any]]:
    """Short, regular conversations of one or two turns, each with its own answer."""
    things = ["red", "green", "blue", "warm", "cold", "small", "large", "old"]
    rows = []
    for i in range(num):
        a, b = things[i % 8], things[(i // 8 + 3 * i) % 8]
        turns = [
            {"role": "user", "content": f"What is {a} and {b}, number {i}?"},
            {"role": "assistant", "content": f"It is {a}, then {b}, and again {a} with {i} {b}s."},
        ]
        if i % 3 == 0:
            turns += [
                {"role": "user", "content": f"And {b}?"},
                {"role": "assistant", "content": f"The {b} one comes after {a}. " * (1 + i % 4)},
            ]
        rows.append({"id": str(i), "messages": turns})
    return rows
