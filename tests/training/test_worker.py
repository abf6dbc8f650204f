"""Trainers as torchrun starts them, against real services and made-up hidden states."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import MakeRun, Run
from tests.training.producer import Producer
from torchspec_hpc.export.checkpoint import read_checkpoint
from torchspec_hpc.transfer.messages import Request

pytestmark = pytest.mark.slow


def stop_when_asked_for(run: Run, position: int):
    """Asks the run to stop once some trainer wants this position of the stream."""

    def on_request(request: Request) -> None:
        if request.ticket == f"train-{position}":
            run.dir.stop.write_text('{"reason": "test"}')

    return on_request


@pytest.mark.parametrize(
    ("num_ranks", "settings"),
    [
        (1, {"micro_batch_size": 2, "draft_accumulation_steps": 2}),
        (2, {"draft_accumulation_steps": 2}),
        (2, {"micro_batch_size": 2, "fsdp_strategy": "replicate", "compute_dtype": "bfloat16"}),
    ],
    ids=["1 rank", "2 ranks", "2 ranks replicate bf16"],
)
def test_a_stopped_run_goes_on_exactly(
    make_run: MakeRun, engine: Producer, num_ranks: int, settings: dict[str, object]
):
    straight, stopped = make_run("straight", **settings), make_run("stopped", **settings)
    assert straight.train(num_ranks) == 0
    engine.on_request = stop_when_asked_for(stopped, 14)
    assert stopped.train(num_ranks) == 85
    at = len(stopped.records())
    assert 2 <= at <= 5
    assert not stopped.dir.done.exists()
    stopped.dir.stop.unlink()
    assert stopped.train(num_ranks) == 0
    assert stopped.dir.done.exists()

    assert [record["step"] for record in stopped.records()] == list(range(1, 9))
    assert stopped.learning() == straight.learning()  # every float, to the last bit
    expected, found = read_checkpoint(straight.dir.root), read_checkpoint(stopped.dir.root)
    assert found.meta["step"] == 8
    assert found.meta["cursor"] == 32
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(tensor, found.tensors[name]), name
    board = EventAccumulator(str(stopped.dir.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))
    assert straight.records()[-1]["train/loss"] < straight.records()[0]["train/loss"]


def test_another_number_of_ranks_goes_on_with_the_same_samples(make_run: MakeRun, engine: Producer):
    straight = make_run("straight", draft_accumulation_steps=4)
    assert straight.train() == 0
    stopped = make_run("stopped", draft_accumulation_steps=2)
    engine.on_request = stop_when_asked_for(stopped, 14)
    assert stopped.train(num_ranks=2) == 85
    stopped.dir.stop.unlink()
    (stopped.dir.root / "config.yaml").write_text(straight.dir.config.read_text())
    assert stopped.train(num_ranks=1) == 0
    for found, expected in zip(stopped.records(), straight.records(), strict=True):
        for tag in ("train/loss", "train/accept_len", "train/lr", "train/epoch"):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-4), tag


def test_checkpoints_are_kept_and_loaded(make_run: MakeRun):
    first = make_run("first", save_interval=2, max_checkpoints=2, num_train_steps=5)
    assert first.train() == 0
    names = sorted(path.name for path in first.dir.checkpoints.iterdir())
    assert names == ["latest", "step_4", "step_5"]

    full = make_run("full", load_path=str(first.dir.checkpoints / "step_4"), num_train_steps=5)
    assert full.train() == 0
    assert full.learning() == first.learning()[4:]

    weights = make_run(
        "weights",
        load_path=str(first.dir.checkpoints / "step_5"),
        continual_training=True,
        seed=1,
        num_train_steps=2,
    )
    assert weights.train() == 0
    assert [record["step"] for record in weights.records()] == [1, 2]
    assert weights.records()[0]["train/loss"] < first.records()[0]["train/loss"]

    other = make_run("other", load_path=str(first.dir.checkpoints / "step_5"), seed=1)
    assert other.train() == 2
    assert "belongs to another stream: seed 0 there, 1 here" in other.errors()["training_0.json"]


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
