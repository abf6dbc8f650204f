"""What people see of ``metrics.jsonl``."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchspec_hpc.cli.progress import newest_line
from torchspec_hpc.cli.report_command import read_records, speed_table, training_table

RECORD = {
    "train/loss": 3.0,
    "train/loss_step_0": 3.0,
    "train/acc_step_0": 0.5,
    "train/accept_len": 1.5,
    "train/skipped_steps": 0,
    "time/step_s": 0.25,
    "throughput/train_tokens_per_s": 1000.0,
    "throughput/wait_share": 0.125,
    "throughput/mfu": 0.4,
    "memory/peak_bytes": 2.0**31,
}


def shown(table: Table) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def metrics(tmp_path: Path, *changes: dict[str, float | None]) -> Path:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": i + 1} | RECORD | change for i, change in enumerate(changes)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_speed_table_has_a_row_for_what_was_measured(tmp_path: Path):
    text = shown(speed_table(read_records(metrics(tmp_path, {}, {}))))
    assert "model FLOP/s utilization" in text
    assert "40.0%" in text
    assert "2.00" in text  # GiB
    assert "engine tokens/s" not in text
    without = {tag: value for tag, value in RECORD.items() if tag != "throughput/mfu"}
    assert "utilization" not in shown(speed_table([without]))


def test_skipped_steps_are_told(tmp_path: Path):
    records = read_records(metrics(tmp_path, {}, {"train/loss": None, "train/skipped_steps": 1}))
    assert "1 steps skipped" in shown(training_table(records, ttt_length=1))
    assert "skipped" not in shown(training_table(records[:1], ttt_length=1))


def test_the_newest_line_passes_over_what_is_null_or_half_written(tmp_path: Path):
    path = metrics(tmp_path, {}, {"train/loss": None})
    path.write_text(path.read_text() + '{"step": 3, "train/lo')
    assert newest_line(path) == (
        "step 2  accept len 1.50  trainer tok/s 1000  waiting 12%  mfu 40.0%"
    )
