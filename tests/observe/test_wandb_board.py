"""Offline, where W&B writes what it would send: its record log is read back."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import read_jsonl
from torchspec_hpc.config import Config, RunDir, parse_config
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.observe.metrics import MetricsWriter
from torchspec_hpc.observe.wandb_board import require_wandb

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None,
    reason="the package wandb is not installed: pip install 'torchspec_hpc[wandb]'",
)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "my_run")
    run.create()
    return run


def config(**logging: object) -> Config:
    raw = {
        "output_dir": "/runs",
        "run_name": "my_run",
        "model": {"target_model_path": "/models/tiny"},
        "dataset": {"train_data_path": "/data/train.jsonl"},
        "inference": {"vllm": {"extra_args": {"hf_token": "hf_secret"}}},
        "logging": {"report_to": "wandb", "wandb_mode": "offline", **logging},
    }
    return parse_config(raw, base_dir=Path("/"), source="test")


def attempt(run: RunDir, steps: range, failed: bool = False, **logging: object) -> None:
    writer = MetricsWriter(config(**logging), run, steps.start)
    for step in steps:
        writer.write(step, {"train/loss": 0.5 * step, "train/grad_norm": float("nan")})
    writer.close(failed=failed)


def payloads(path: Path) -> Iterator[bytes]:
    """Entries of a log in LevelDB's format behind a header of 7 bytes."""
    content, at, entry = path.read_bytes(), 7, b""
    while at < len(content):
        if (room := 32768 - at % 32768) < 7:  # no header fits: the block's end is padding
            at += room
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        entry += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def records(run: RunDir) -> list[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    paths = sorted(run.wandb.glob("offline-run-*/*.wandb"))
    return [Record.FromString(payload) for path in paths for payload in payloads(path)]


def points(run: RunDir) -> list[tuple[int, dict[str, float]]]:
    return [
        (
            record.history.step.num,
            {
                item.key or "/".join(item.nested_key): float(item.value_json)
                for item in record.history.item
                if not (item.key or item.nested_key[0]).startswith("_")
            },
        )
        for record in records(run)
        if record.WhichOneof("record_type") == "history"
    ]


@needs_wandb
def test_attempts_are_one_run_without_duplicated_steps(run: RunDir):
    attempt(run, range(1, 6), failed=True)
    attempt(run, range(3, 5), failed=True)  # from a checkpoint, and ended before it caught up
    attempt(run, range(3, 8))
    assert points(run) == [(step, {"train/loss": 0.5 * step}) for step in range(1, 8)]
    found = records(run)
    assert {record.run.run_id for record in found if record.HasField("run")} == {run.run_id}
    codes = [record.exit.exit_code for record in found if record.HasField("exit")]
    assert codes == [1, 1, 0]


@needs_wandb
def test_a_line_cut_short_by_a_kill_does_not_count(run: RunDir):
    attempt(run, range(1, 4))
    run.wandb_steps.write_text("1\n2\n3\n12")
    attempt(run, range(3, 5))
    assert [step for step, _ in points(run)] == [1, 2, 3, 4]


@needs_wandb
def test_names_are_those_of_the_run_unless_given(run: RunDir):
    attempt(run, range(1, 2))
    attempt(run, range(2, 3), wandb_project="p", wandb_name="n", wandb_group="g", wandb_entity="e")
    runs = [record.run for record in records(run) if record.HasField("run")]
    names = [(run.entity, run.project, run.display_name, run.run_group) for run in runs]
    assert names == [("", "torchspec_hpc", "my_run", "my_run"), ("e", "p", "n", "g")]


@needs_wandb
def test_nothing_secret_is_sent(run: RunDir):
    attempt(run, range(1, 2))
    run.secret.write_text("run_secret")
    told = b"".join(path.read_bytes() for path in run.wandb.rglob("*") if path.is_file())
    assert b"max_seq_length" in told
    assert b"extra_args" not in told
    assert b"hf_secret" not in told
    assert b"run_secret" not in told


@needs_wandb
def test_the_end_of_its_process_is_not_ours(run: RunDir, caplog: pytest.LogCaptureFixture):
    writer = MetricsWriter(config(), run, 1)
    writer.write(1, {"train/loss": 1.0})
    for name in Path("/proc/self/task").glob("*/children"):
        for child in map(int, name.read_text().split()):
            if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    for step in range(2, 6):
        time.sleep(0.2)  # it is noticed with the first or the second one
        writer.write(step, {"train/loss": 1.0})
    writer.close(failed=False)
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3, 4, 5]
    assert caplog.text.count("W&B gets nothing more of this attempt") == 1


@needs_wandb
def test_without_a_key_it_is_said_what_to_do_and_a_resumed_run_goes_on(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("HOME", str(run.root))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"(?s)W&B does not take the run.*wandb_mode to offline"):
        attempt(run, range(1, 2), wandb_mode="online")
    assert not run.metrics.exists()
    attempt(run, range(2, 4), wandb_mode="online")
    assert "no W&B in this attempt: W&B does not take the run" in caplog.text
    assert [row["step"] for row in read_jsonl(run.metrics)] == [2, 3]


@pytest.mark.parametrize("folder_of_that_name", [False, True])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_of_that_name: bool
):
    if folder_of_that_name:
        (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"torchspec_hpc\[wandb\]"):
        require_wandb()
