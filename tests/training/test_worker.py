"""Trainers as torchrun starts them, against real services and made-up hidden states."""

from __future__ import annotations

import json
import shutil
import threading

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import MakeRun, Run
from tests.training.producer import Producer
from torchspec_hpc.export.checkpoint import read_checkpoint
from torchspec_hpc.transfer.messages import Request

pytestmark = pytest.mark.slow


def stop_once_asked_for(run: Run, position: int, engine: Producer) -> None:
    """Asks the run to stop once some trainer wants this position of the stream."""

    def on_request(request: Request) -> None:
        if request.ticket == f"train-{position}":
            run.dir.stop.write_text('{"reason": "test"}')

    engine.on_request = on_request


def stop_before_the_first_step(run: Run, engine: Producer) -> None:
    """Asks the run to stop while its trainer waits for an engine that does not answer."""
    answer = threading.Event()

    def on_request(request: Request) -> None:
        run.dir.stop.write_text('{"reason": "test"}')
        answer.wait(60)

    engine.on_request = on_request
    try:
        assert run.train() == 85
    finally:
        answer.set()
    assert not run.records()
    assert (run.dir.checkpoints / "latest").read_text() == "step_0\n"


def test_a_stopped_run_goes_on_exactly(make_run: MakeRun, engine: Producer):
    settings = {"micro_batch_size": 2, "draft_accumulation_steps": 2}
    straight = make_run("straight", save_interval=3, max_checkpoints=2, evaluate=True, **settings)
    assert straight.train() == 0
    names = sorted(path.name for path in straight.dir.checkpoints.iterdir())
    assert names == ["latest", "step_6", "step_8"]
    records = straight.records()
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert [r["step"] for r in records if "eval/accept_len" in r] == [3, 6, 8]

    stopped = make_run("stopped", evaluate=True, **settings)
    stop_before_the_first_step(stopped, engine)
    stopped.dir.stop.unlink()
    stop_once_asked_for(stopped, 14, engine)
    assert stopped.train() == 85
    assert 2 <= len(stopped.records()) <= 5
    assert not stopped.dir.done.exists()
    stopped.dir.stop.unlink()
    assert stopped.train() == 0
    assert stopped.dir.done.exists()
    assert_same_run(stopped, straight)
    board = EventAccumulator(str(stopped.dir.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))

    # a new run from a checkpoint of this one
    load_path = str(straight.dir.checkpoints / "step_6")
    loaded = make_run("loaded", load_path=load_path, evaluate=True, **settings)
    assert loaded.train() == 0
    assert loaded.learning() == straight.learning()[6:]


def test_two_ranks_go_on_exactly_and_one_rank_with_the_same_samples(
    make_run: MakeRun, engine: Producer
):
    straight = make_run("straight", draft_accumulation_steps=2)
    assert straight.train(num_ranks=2) == 0
    stopped = make_run("stopped", draft_accumulation_steps=2)
    stop_once_asked_for(stopped, 14, engine)
    assert stopped.train(num_ranks=2) == 85
    stopped.dir.stop.unlink()
    alone = make_run("alone", draft_accumulation_steps=4)
    config = alone.dir.config.read_text()
    shutil.copytree(stopped.dir.root, alone.dir.root, symlinks=True, dirs_exist_ok=True)
    alone.dir.config.write_text(config)

    assert stopped.train(num_ranks=2) == 0
    assert_same_run(stopped, straight)
    assert alone.train(num_ranks=1) == 0
    for found, expected in zip(alone.records(), straight.records(), strict=True):
        for tag in ("train/loss", "train/accept_len", "train/lr", "train/epoch"):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-4), tag


def assert_same_run(found: Run, expected: Run) -> None:
    """Metrics and parameters, to the last bit."""
    assert [record["step"] for record in found.records()] == list(range(1, 9))
    assert found.learning() == expected.learning()
    ours, theirs = read_checkpoint(found.dir.root), read_checkpoint(expected.dir.root)
    assert (ours.meta.step, ours.meta.cursor) == (8, 32)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in theirs.tensors.items():
        assert torch.equal(tensor, ours.tensors[name]), name


def test_one_message_for_an_error_of_one_rank(make_run: MakeRun, engine: Producer):
    run = make_run("refused")
    engine.on_request = lambda request: "out of order" if request.ticket == "train-5" else None
    assert run.train(num_ranks=2) == 1
    (error,) = run.errors().values()
    assert "out of order" in json.loads(error)["error"]
    assert not run.dir.checkpoints.exists()


def test_bad_data_is_a_user_error(make_run: MakeRun, tmp_path):
    run = make_run("no-data", data=tmp_path / "missing.jsonl")
    assert run.train(num_ranks=2) == 2
    (error,) = run.errors().values()
    assert "there is no data file" in json.loads(error)["error"]
