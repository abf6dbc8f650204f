"""Figures of an evaluation: everything of it but the engine."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchspec_hpc.cli.evaluate_command import (
    BASELINE,
    decimals,
    list_engines,
    numbers,
    served_table,
    to_json,
)
from torchspec_hpc.errors import UserError
from torchspec_hpc.export.evaluate import Measurement, Served, ServeSettings, measure
from torchspec_hpc.export.figures import accept_len_interval, percentile
from torchspec_hpc.export.plots import write_plots, write_tensorboard

LATENCY = {"p50": 1.0, "p90": 1.5, "p99": 2.0}
ALONE = Measurement(
    name=BASELINE, num_speculative_tokens=0, prompts="chat", temperature=0.0, concurrency=8,
    num_answers=2, num_tokens=5, seconds=2.0, num_drafts=0, accept_len=1.0,
    accept_len_interval=None, accept_by_position=(), latency_s=LATENCY, first_token_s=LATENCY,
    outputs=(((1, 2),), ((3, 4, 5),)),
)  # fmt: skip
DRAFTED = replace(
    ALONE, name="d", num_speculative_tokens=2, seconds=1.0, num_drafts=3, accept_len=1.5,
    accept_len_interval=(1.4, 1.6), accept_by_position=(0.4, 0.1),
    outputs=(((1, 2),), ((3, 4, 6),)),
)  # fmt: skip


def test_a_draft_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no exported draft"):
        measure(ServeSettings("t"), Served("d", tmp_path, 3), [], tmp_path / "log")


def test_drafts_are_compared_with_the_target_alone() -> None:
    sampled = replace(DRAFTED, temperature=1.0)
    rows = to_json([ALONE, DRAFTED, sampled], "t", 64)["results"]
    assert [row["same_answers"] for row in rows] == [1.0, 0.5, None]
    assert [row["speed_up"] for row in rows] == [1.0, 2.0, None], "only with the same case"
    assert "outputs" not in rows[0]


def test_the_table_says_once_what_is_the_same() -> None:
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(served_table(to_json([ALONE, DRAFTED], "t", 64)))
    text = console.export_text()
    assert "k 2; prompts chat; temperature 0; in flight 8" in text
    assert "1.500 [1.40, 1.60]" in text
    assert "0.40 0.10" in text
    assert "2.00x" in text


def test_bootstrap_interval() -> None:
    random = np.random.default_rng(1)
    drafts = random.integers(20, 40, size=400)
    accepted = random.binomial(drafts, 0.6)
    low, high = accept_len_interval(list(zip(drafts.tolist(), accepted.tolist(), strict=True)))
    assert low < 1.6 < high
    assert high - low < 0.05
    few = accept_len_interval([(10, 2), (10, 18), (0, 0)])
    assert few == accept_len_interval([(10, 2), (10, 18), (0, 0)]), "seeded"
    assert few[1] - few[0] > 1
    assert percentile([1.0, 2.0, 3.0], 50) == 2.0


@pytest.mark.parametrize(
    ("text", "found"), [("3", [3]), ("1-4", [1, 2, 3, 4]), ("7, 1,3", [1, 3, 7]), ("2,1-2", [1, 2])]
)
def test_numbers(text: str, found: list[int]) -> None:
    assert numbers(text, "-k") == found


@pytest.mark.parametrize("text", ["", "0", "3-1", "a", "1.5"])
def test_bad_numbers(text: str) -> None:
    with pytest.raises(UserError, match="whole numbers from 1"):
        numbers(text, "-k")


def test_temperatures() -> None:
    assert decimals("1,0,0.5", "-t") == [0.0, 0.5, 1.0]
    for text in ("", "-1", "hot"):
        with pytest.raises(UserError, match="numbers from 0"):
            decimals(text, "-t")


def test_engines(tmp_path: Path) -> None:
    found = list_engines(["a=/x", "/y/b"], [1, 3], baseline=True)
    assert [(e.name, e.num_speculative_tokens) for e in found] == [
        (BASELINE, 0), ("a", 1), ("a", 3), ("b", 1), ("b", 3),
    ]  # fmt: skip
    with pytest.raises(UserError, match="two drafts have one name"):
        list_engines(["/x/d", "/y/d"], [3], baseline=True)
    with pytest.raises(UserError, match="nothing to evaluate"):
        list_engines([], [3], baseline=False)


def test_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = to_json([ALONE, DRAFTED], "t", 64)["results"]
    files = write_plots(results, tmp_path)
    assert [file.name for file in files] == [
        "accept_len_chat.png", "by_position_chat.png", "tokens_per_s_chat.png",
    ]  # fmt: skip
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_tensorboard(tmp_path: Path) -> None:
    write_tensorboard(to_json([ALONE, DRAFTED], "t", 64)["results"], tmp_path)
    events = EventAccumulator(str(tmp_path / "d"))
    events.Reload()
    [tag] = [tag for tag in events.Tags()["scalars"] if tag.startswith("served_accept_len")]
    [scalar] = events.Scalars(tag)
    assert (scalar.step, scalar.value) == (2, 1.5)
