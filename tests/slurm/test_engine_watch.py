"""What the supervisor makes of engines that come, fail and go."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from torchspec_hpc.config.rundir import RunDir, write_atomic
from torchspec_hpc.config.transfer_schema import ControlConfig
from torchspec_hpc.errors import DeadlineExceeded
from torchspec_hpc.slurm.engine_watch import EnginesLost, EngineWatch

CONTROL = ControlConfig(engine_ready_s=100, engines_lost_s=50)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create()
    return run


def get_ready(run: RunDir, rank: int) -> Path:
    path = run.ready / f"inference_{rank}.json"
    write_atomic(path, {"ready": True})
    return path


def fail(run: RunDir, rank: int) -> Path:
    words = {"role": "inference", "rank": rank, "node": "n", "error": "no memory", "exit_code": 1}
    path = run.errors / f"inference_{rank}.json"
    write_atomic(path, words)
    return path


def test_the_first_engine_has_its_time(run: RunDir) -> None:
    watch = EngineWatch(run, CONTROL, 0)
    watch.look(100, trains=False)
    with pytest.raises(DeadlineExceeded, match="engine_ready_s"):
        watch.look(101, trains=False)


def test_a_run_without_engines_goes_on_for_a_while(run: RunDir) -> None:
    watch = EngineWatch(run, CONTROL, 0)
    only = get_ready(run, 0)
    watch.look(90, trains=False)
    only.unlink()
    watch.look(140, trains=False)
    only = get_ready(run, 1000)  # of another job
    watch.look(145, trains=False)
    only.unlink()
    watch.look(190, trains=True)  # what was prefetched
    watch.look(240, trains=False)
    with pytest.raises(EnginesLost, match=r"no engine for 51 s \(control.engines_lost_s\)"):
        watch.look(241, trains=False)


def test_it_tells_what_happens_once(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchspec_hpc")
    watch = EngineWatch(run, CONTROL, 0)
    get_ready(run, 0)
    lost = get_ready(run, 1)
    for now in range(3):
        watch.look(now, trains=False)
    lost.unlink()
    failure = fail(run, 1)
    for now in range(3):
        watch.look(now, trains=False)
    get_ready(run, 1)
    watch.look(3, trains=False)
    get_ready(run, 0)  # killed and back before anybody looked
    watch.look(4, trains=False)
    assert [record.getMessage() for record in caplog.records] == [
        "inference rank 0 is ready",
        "inference rank 1 is ready",
        "inference rank 1 on n: no memory",
        "inference rank 1 has ended; engines left: 1",
        "inference rank 1 is ready",
        "inference rank 0 is ready",
    ]
    assert not failure.exists(), "an engine that is back is no cause of what may come"
