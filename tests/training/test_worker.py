"""Trainers as torchrun starts them, against real services and made-up hidden states."""

from __future__ import annotations

import json
import math
import shutil
import threading

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import MakeRun, Run
from tests.training.producer import Producer
from tests.training.saved import assert_same_content, content
from torchspec_hpc.config import load_config
from torchspec_hpc.config.rundir import cache_dir
from torchspec_hpc.data.dataset import prepare_dataset
from torchspec_hpc.data.shards import COLUMNS, Encoded, shard_path, write_index, write_shard
from torchspec_hpc.export.checkpoint import read_checkpoint
from torchspec_hpc.transfer.messages import Request

pytestmark = pytest.mark.slow


def stop_once_asked_for(run: Run, pack: int, engine: Producer) -> None:
    """Asks the run to stop once some trainer wants this pack of the stream."""

    def on_request(request: Request) -> None:
        if request.ticket == f"train-{pack}.0":
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
    settings = {"micro_batch_tokens": 300, "draft_accumulation_steps": 2}
    straight = make_run("straight", save_interval=3, max_checkpoints=2, evaluate=True, **settings)
    assert straight.train() == 0
    names = sorted(path.name for path in straight.dir.checkpoints.iterdir())
    assert names[1:] == ["latest", "step_6", "step_8"]
    records = straight.records()
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert [r["step"] for r in records if "eval/accept_len" in r] == [3, 6, 8]

    stopped = make_run("stopped", evaluate=True, **settings)
    stop_before_the_first_step(stopped, engine)
    stopped.dir.stop.unlink()
    stop_once_asked_for(stopped, 7, engine)
    assert stopped.train() == 85
    assert 2 <= len(stopped.records()) <= 5
    assert not stopped.dir.done.exists()
    stopped.dir.stop.unlink()
    assert stopped.train() == 0
    assert stopped.dir.done.exists()
    assert_same_run(stopped, straight, cursor=16)
    assert straight.records()[-1]["train/epoch"] > 1  # packs of two epochs
    board = EventAccumulator(str(stopped.dir.tensorboard)).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))

    # a new run from a checkpoint of this one
    load_path = str(straight.dir.checkpoints / "step_6")
    loaded = make_run("loaded", load_path=load_path, evaluate=True, **settings)
    assert loaded.train() == 0
    assert loaded.learning() == straight.learning()[6:]
    for place in (straight.dir.root, straight.dir.latest_checkpoint):  # which is of step 8
        same = make_run(f"loaded-{place.name}", load_path=str(place), **settings)
        assert same.train() == 0
        assert not same.records()
    retrained = make_run(
        "weights",
        load_path=str(straight.dir.checkpoints),
        continual_training=True,
        freeze_lm_head=True,
        **settings | {"num_train_steps": 1},
    )
    assert retrained.train() == 0

    other_packs = make_run("other-packs", load_path=load_path, micro_batch_tokens=400)
    assert other_packs.train() == 2
    (error,) = other_packs.errors().values()
    assert "another stream: micro_batch_tokens 300 there, 400 here" in json.loads(error)["error"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    make_run: MakeRun, engine: Producer, before: int, after: int
):
    straight = make_run("straight", draft_accumulation_steps=4 // before)
    assert straight.train(before) == 0
    stopped = make_run("stopped", draft_accumulation_steps=4 // before)
    stop_once_asked_for(stopped, 14, engine)
    assert stopped.train(before) == 85
    stopped.dir.stop.unlink()
    others = make_run("others", draft_accumulation_steps=4 // after)
    config = others.dir.config.read_text()
    shutil.copytree(stopped.dir.root, others.dir.root, symlinks=True, dirs_exist_ok=True)
    others.dir.config.write_text(config)

    assert stopped.train(before) == 0
    assert_same_run(stopped, straight, cursor=32)
    assert others.train(after) == 0
    for found, expected in zip(others.records(), straight.records(), strict=True):
        for tag in ("train/loss", "train/accept_len", "train/lr", "train/epoch"):
            assert found[tag] == pytest.approx(expected[tag], rel=1e-5), tag


def assert_same_run(found: Run, expected: Run, cursor: int) -> None:
    """Metrics, parameters, moments of the optimizer and random state, to the last bit."""
    assert [record["step"] for record in found.records()] == list(range(1, 9))
    assert found.learning() == expected.learning()
    meta = read_checkpoint(found.dir.root).meta
    assert (meta.step, meta.cursor) == (8, cursor)
    ours, theirs = (content(run.dir.checkpoints / "step_8") for run in (found, expected))
    assert any("exp_avg_sq" in name for name in theirs)
    assert any(name.startswith("rng") for name in theirs)
    assert_same_content(ours, theirs)


#: Length of a sample, and from where on it is supervised; by twos for the ranks, by fours a step.
ODD_SAMPLES = [
    *[(40, 5), (30, 99), (96, 2), (96, 99)],  # nothing for the second rank
    *[(20, 99), (1, 0), (96, 99), (2, 0)],  # nothing for anybody: too short counts as nothing
    *[(1, 0), (96, 95), (3, 2), (50, 0)],
    *[(1, 99), (1, 99), (2, 1), (96, 0)],
]


def write_odd_samples(run: Run) -> None:
    """Puts samples that no tokenizer would make in the place of the prepared data."""
    config = load_config(run.dir.config)
    dataset = prepare_dataset(
        config.dataset.train_data_path,
        config.dataset,
        config.model,
        config.training.max_seq_length,
        cache_dir(config),
    )
    samples = []
    for length, first in ODD_SAMPLES:
        mask = np.arange(length) >= first
        ids = np.resize(dataset[0].input_ids, length)
        columns = dict.fromkeys(COLUMNS, 0) | {"length": length}
        samples.append(Encoded(ids, mask, columns))
    write_shard(shard_path(dataset.folder, 0), samples, [], len(samples))
    lengths = np.array([length for length, _ in ODD_SAMPLES], dtype=np.int32)
    place = {"shard": np.zeros_like(lengths), "start": np.cumsum(lengths, dtype=np.int64) - lengths}
    write_index(dataset.folder, {"length": lengths, **place})


@pytest.mark.parametrize("packing", [{"micro_batch_size": 1}, {"micro_batch_tokens": 100}])
def test_odd_samples_neither_starve_nor_hang(make_run: MakeRun, packing: dict[str, int]):
    run = make_run("odd", shuffle=False, draft_accumulation_steps=2, **packing)
    write_odd_samples(run)
    assert run.train(num_ranks=2) == 0
    records = run.records()
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[-1]["train/skipped_steps"] == 0
    assert all(math.isfinite(record["train/loss"]) for record in records)
    assert 0 < records[4]["train/loss"] < records[0]["train/loss"]
    if "micro_batch_size" in packing:
        assert records[1]["train/loss"] == records[1]["train/grad_norm"] == 0


def test_one_message_for_an_error_of_one_rank(make_run: MakeRun, engine: Producer):
    run = make_run("refused")
    engine.on_request = lambda request: "out of order" if request.ticket == "train-5.0" else None
    assert run.train(num_ranks=2) == 1
    (error,) = run.errors().values()
    assert "out of order" in json.loads(error)["error"]
    steps = [record["step"] for record in run.records()]  # what was trained before is kept
    assert 0 < len(steps) < 8
    assert (run.dir.checkpoints / "latest").read_text() == f"step_{steps[-1]}\n"


def test_engines_that_hang_cost_no_step(make_run: MakeRun, engine: Producer):
    """The rank that waits in vain has every rank save before it fails."""
    patience = {"request_deadline_s": 1, "engine_ready_s": 1, "engines_lost_s": 1}
    run = make_run("starved", control=patience)
    answer = threading.Event()
    engine.on_request = lambda request: request.ticket == "train-7.0" and not answer.wait(60)
    assert run.train(num_ranks=2) == 1
    answer.set()
    assert (run.dir.checkpoints / "latest").read_text() == f"step_{len(run.records())}\n"
    assert run.errors()
    for error in run.errors().values():  # of one rank or both
        assert "the hidden states of sample 'train-" in json.loads(error)["error"]


def test_bad_data_is_a_user_error(make_run: MakeRun, tmp_path):
    run = make_run("no-data", data=tmp_path / "missing.jsonl")
    assert run.train(num_ranks=2) == 2
    (error,) = run.errors().values()
    assert "there is no data file" in json.loads(error)["error"]
