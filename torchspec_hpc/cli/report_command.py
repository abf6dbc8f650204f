"""``torchspec-hpc report``: what a run has to say for itself."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchspec_hpc.cli.evaluate_command import served_table
from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.errors import UserError

#: Steps at the end of a run over which figures are averaged.
WINDOW = 25


def report_command(run: RunDir) -> None:
    """Prints the figures of the last steps, and the served ones if they were measured."""
    records = read_records(run.metrics)
    window = records[-WINDOW:]
    console = Console()
    console.print(training_table(window, load_config(run.config).training.ttt_length))
    console.print(speed_table(records))
    if run.evaluation.is_file():
        console.print(served_table(json.loads(run.evaluation.read_text(encoding="utf-8"))))


def read_records(path: Path) -> list[dict[str, float]]:
    """Training records of ``metrics.jsonl``.

    Raises:
        UserError: There is none yet.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [record for line in lines if "train/loss" in (record := json.loads(line))]
    if not records:
        raise UserError(f"{path} holds no training step yet", hint="see the logs of the run")
    return records


def mean(records: list[dict[str, float]], key: str) -> float:
    """Mean of a metric over the records that have it; a step that was skipped has null."""
    values = [value for record in records if (value := record.get(key)) is not None]
    return statistics.fmean(values) if values else float("nan")


def training_table(window: list[dict[str, float]], ttt_length: int) -> Table:
    """Loss and acceptance by TTT step."""
    first, last = window[0]["step"], window[-1]["step"]
    table = Table(title=f"Training, mean of steps {first} to {last}")
    table.add_column("TTT step")
    table.add_column("loss", justify="right")
    table.add_column("acceptance", justify="right")
    for i in range(ttt_length):
        loss = mean(window, f"train/loss_step_{i}")
        table.add_row(str(i), f"{loss:.3f}", f"{mean(window, f'train/acc_step_{i}'):.3f}")
    estimate = mean(window, "train/accept_len")
    table.caption = f"acceptance length, training estimate with bonus token: {estimate:.3f}"
    if skipped := window[-1].get("train/skipped_steps"):
        table.caption += f"; {skipped:.0f} steps skipped, their gradient was not finite"
    return table


#: Rows of the throughput table: label, metric, unit that it is shown in, form.
SPEEDS = (
    ("trainer tokens/s", "throughput/train_tokens_per_s", 1, "{:.0f}"),
    ("engine tokens/s", "throughput/inference_tokens_per_s", 1, "{:.0f}"),
    ("end to end tokens/s", "throughput/tokens_per_s", 1, "{:.0f}"),
    ("step spent waiting for data", "throughput/wait_share", 1, "{:.1%}"),
    ("tokens that are supervised", "train/supervised_share", 1, "{:.1%}"),
    ("rows of the TTT steps left out", "train/rows_left_out_share", 1, "{:.1%}"),
    ("step, s", "time/step_s", 1, "{:.3f}"),
    ("  forward and backward, s", "time/compute_s", 1, "{:.3f}"),
    ("  update, s", "time/optimizer_s", 1, "{:.3f}"),
    ("held up by checkpoints, s a step", "time/checkpoint_s", 1, "{:.3f}"),
    ("TFLOP/s, all ranks", "throughput/flops_per_s", 1e12, "{:.2f}"),
    ("model FLOP/s utilization", "throughput/mfu", 1, "{:.1%}"),
    ("memory of the fullest rank, GiB", "memory/peak_bytes", 2**30, "{:.2f}"),
    ("through Mooncake, MB/s", "transfer/bytes_per_s", 1e6, "{:.2f}"),
)


def speed_table(records: list[dict[str, float]]) -> Table:
    """Throughput of both sides over the whole run, start-up left out; rows that it has."""
    table = Table(title="Throughput, mean over the run")
    table.add_column("")
    table.add_column("", justify="right")
    steady = records[min(5, len(records) - 1) :]
    for label, key, unit, form in SPEEDS:
        if any(key in record for record in steady):
            table.add_row(label, form.format(mean(steady, key) / unit))
    return table
