from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import read_jsonl
from torchspec_hpc.config import Config, RunDir, parse_config
from torchspec_hpc.observe.metrics import MetricsWriter


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path)
    run.create()
    return run


def config(**logging: object) -> Config:
    raw = {
        "output_dir": "/runs",
        "model": {"target_model_path": "/models/tiny"},
        "dataset": {"train_data_path": "/data/train.jsonl"},
        "logging": logging,
    }
    return parse_config(raw, base_dir=Path("/"), source="test")


@contextmanager
def writing(run: RunDir, first_step: int = 1, **logging: object) -> Iterator[MetricsWriter]:
    writer = MetricsWriter(config(**logging), run, first_step)
    yield writer
    writer.close(failed=False)


def write(run: RunDir, steps: range, offset: float = 0.0, **logging: object) -> None:
    with writing(run, steps.start, **logging) as writer:
        for step in steps:
            writer.write(step, {"train/loss": step + offset})


def points(run: RunDir, tag: str = "train/loss") -> list[tuple[int, float]]:
    board = EventAccumulator(str(run.tensorboard)).Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_a_resumed_run_has_one_curve_without_duplicates(run: RunDir):
    write(run, range(1, 6))
    write(run, range(4, 8), offset=100.0)  # stopped at 5, the last checkpoint was at 3
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 104.0), (5, 105.0), (6, 106.0), (7, 107.0)]
    assert [(row["step"], row["train/loss"]) for row in read_jsonl(run.metrics)] == expected
    assert points(run) == expected


def test_a_line_cut_short_by_a_kill_is_removed(run: RunDir):
    write(run, range(1, 4), report_to="none")
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "train/lo')
    write(run, range(4, 5), report_to="none")
    assert [row["step"] for row in read_jsonl(run.metrics)] == [1, 2, 3, 4]
    assert not run.tensorboard.exists()


def test_what_is_not_finite_is_null_and_no_point(run: RunDir):
    with writing(run) as writer:
        writer.write(1, {"train/loss": math.nan, "train/lr": 0.1})
        writer.write(2, {"train/loss": 2.0, "train/lr": math.inf})
    assert read_jsonl(run.metrics)[0] == {"step": 1, "train/loss": None, "train/lr": 0.1}
    assert points(run) == [(2, 2.0)]


def test_floats_are_exact(run: RunDir):
    value = 0.1 + 0.2
    with writing(run, report_to="none") as writer:
        writer.write(1, {"train/loss": value})
    assert read_jsonl(run.metrics)[0]["train/loss"] == value


def test_the_board_gets_every_interval_th_step(run: RunDir):
    with writing(run, log_interval=2) as writer:
        for step in range(1, 6):
            writer.write(step, {"train/loss": float(step)})
    assert points(run) == [(2, 2.0), (4, 4.0)]
    assert len(read_jsonl(run.metrics)) == 5
