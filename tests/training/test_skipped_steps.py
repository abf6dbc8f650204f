"""Real trainers whose hidden states are broken now and then."""

from __future__ import annotations

import json
import math

import pytest

from tests.training import producer
from tests.training.conftest import MakeRun, Run
from tests.training.producer import Producer, hidden_states
from torchspec_hpc.config import load_config
from torchspec_hpc.training.optim import Schedule
from torchspec_hpc.transfer.messages import Request

pytestmark = pytest.mark.slow


@pytest.fixture
def break_packs(engine: Producer, monkeypatch: pytest.MonkeyPatch):
    """Makes the hidden states of these packs infinite; may ask a run to stop at one of them."""
    broken = False

    def made(*arguments):
        return hidden_states(*arguments) * (math.inf if broken else 1.0)

    def break_them(packs: set[int], stop: tuple[Run, int] | None = None) -> None:
        def on_request(request: Request) -> None:
            nonlocal broken
            pack = int(request.ticket.removeprefix("train-").split(".")[0])
            broken = pack in packs
            if stop and pack == stop[1]:
                stop[0].dir.stop.write_text('{"reason": "test"}')

        engine.on_request = on_request

    monkeypatch.setattr(producer, "hidden_states", made)
    return break_them


def skipped_of_latest(run: Run) -> int:
    name = (run.dir.checkpoints / "latest").read_text().strip()
    return json.loads((run.dir.checkpoints / name / "meta.json").read_text())["skipped"]


def test_skipped_steps_leave_the_schedule_and_survive_a_resume(make_run: MakeRun, break_packs):
    settings = {"max_skipped_steps": 3, "warmup_ratio": 0.25}
    straight = make_run("straight", **settings)
    break_packs({1, 2, 5})
    assert straight.train() == 0
    records = straight.records()
    assert [r["train/skipped_steps"] for r in records] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert [r["step"] for r in records if r["train/grad_norm"] is None] == [2, 3, 6]
    schedule = Schedule.from_config(load_config(straight.dir.config).training, num_steps=8)
    updates = [0, 1, 1, 1, 2, 3, 3, 4]
    assert [r["train/lr"] for r in records] == [schedule(n) for n in updates]

    stopped = make_run("stopped", **settings)
    break_packs({1, 2, 5}, stop=(stopped, 4))
    assert stopped.train() == 85
    assert skipped_of_latest(stopped) == 2
    stopped.dir.stop.unlink()
    break_packs({1, 2, 5})
    assert stopped.train() == 0
    assert stopped.learning() == straight.learning()
    assert skipped_of_latest(stopped) == 3


def test_too_many_in_a_row_end_the_run(make_run: MakeRun, break_packs):
    run = make_run("broken", max_skipped_steps=2)
    break_packs({0, 2, 3, 4})
    assert run.train() == 1
    assert [r["step"] for r in run.records()] == [1, 2, 3, 4]
    (error,) = run.errors().values()
    assert "not finite in 2 steps in a row, up to step 4" in error
    assert "lower training.learning_rate" in error
