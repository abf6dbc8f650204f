from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.training import tiny
from tests.training.saved import assert_same_content, checkpointer, content
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import BestCheckpoint, latest_checkpoint
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta, Progress
from torchspec_hpc.errors import UserError
from torchspec_hpc.training.checkpoint import Checkpointer, CheckpointError

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_rank")


def change(saver: Checkpointer, seed: int) -> None:
    """One optimizer step with a made-up gradient."""
    torch.manual_seed(seed)
    for parameter in saver._draft.parameters():
        parameter.grad = torch.randn_like(parameter)
    saver._optimizer.step()
    saver._optimizer.zero_grad()


def saved(saver: Checkpointer, step: int) -> Path:
    """Saves and waits."""
    saver.save(Progress(step, 6 * step))
    saver.wait()
    folder = latest_checkpoint(saver._run)
    assert folder is not None
    return folder


@pytest.mark.parametrize("is_async", [True, False])
def test_random_state_and_progress_go_on(tmp_path: Path, is_async: bool):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft(), is_async)
    torch.manual_seed(5)
    saver.save(Progress(4, 24, 1))
    saver.wait()
    expected = torch.rand(3)
    assert saver.load(run.checkpoints / "step_4") == Progress(4, 24, 1)
    assert torch.equal(torch.rand(3), expected)


def test_what_training_changes_meanwhile_is_not_in_the_file(tmp_path: Path, monkeypatch):
    runs = {is_async: RunDir(tmp_path / str(is_async)) for is_async in (True, False)}
    draft = tiny.draft()
    saver = checkpointer(runs[True], draft)
    at_once = Checkpointer(
        runs[False],
        saver._world,
        draft,
        saver._optimizer,
        saver._meta,
        saver._config.model_copy(update={"async_checkpoint": False}),
    )
    trained, write_data = threading.Event(), FileSystemWriter.write_data

    def write_late(*arguments: object) -> object:
        assert trained.wait(30)
        return write_data(*arguments)

    for step in (1, 2):  # the second copies into memory of the first
        change(saver, step)
        at_once.save(Progress(step, 6 * step))
        trained.clear()
        monkeypatch.setattr(FileSystemWriter, "write_data", write_late)
        saver.save(Progress(step, 6 * step))
        monkeypatch.undo()
        change(saver, 10 + step)
        assert not saver._in_flight.done()
        saver.check()  # nothing to complain of
        trained.set()
        saver.wait()
        found, expected = (content(runs[k].checkpoints / f"step_{step}") for k in (True, False))
        assert_same_content(found, expected)
        assert not torch.equal(found["model.fc.weight"], draft.fc.weight.full_tensor())


def test_one_save_in_flight_and_none_twice(tmp_path: Path, monkeypatch):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    write_data = FileSystemWriter.write_data
    at_work: list[int] = []

    def write_alone(*arguments: object) -> object:
        at_work.append(1)
        assert len(at_work) == 1
        result = write_data(*arguments)
        at_work.pop()
        return result

    monkeypatch.setattr(FileSystemWriter, "write_data", write_alone)
    for step in (1, 2, 3):
        assert saver.save(Progress(step, 6 * step)) > 0
    saver.wait()
    assert latest_checkpoint(run) == run.checkpoints / "step_3"
    modified = (run.checkpoints / "step_3").stat().st_mtime_ns
    assert saved(saver, 3).stat().st_mtime_ns == modified


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, damage: str):
    saver = checkpointer(RunDir(tmp_path), tiny.draft())
    folder = saved(saver, 1)
    (data,) = folder.glob("*.distcp")
    if damage == "removed":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    for load in (saver.load, saver.load_weights):
        with pytest.raises(CheckpointError, match=f"cannot load the checkpoint {folder}"):
            load(folder)


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["data", "meta", "rename"])
@pytest.mark.parametrize("notices", ["save", "check", "wait"])
def test_a_failed_save_is_an_error_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch, where: str, notices: str
):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    saved(saver, 1)
    owner, name = {
        "data": (FileSystemWriter, "write_data"),
        "meta": (CheckpointMeta, "write"),
        "rename": (Path, "rename"),
    }[where]
    monkeypatch.setattr(owner, name, full_disk)
    saver.save(Progress(2, 12))
    assert saver._in_flight.exception(30) is not None
    with pytest.raises(CheckpointError, match=r"cannot save the checkpoint .*No space left"):
        {
            "save": lambda: saver.save(Progress(3, 18)),
            "check": saver.check,
            "wait": saver.wait,
        }[notices]()
    assert latest_checkpoint(run) == run.checkpoints / "step_1"
    monkeypatch.undo()
    assert saved(saver, 2) == run.checkpoints / "step_2"  # over what the failure left


def test_a_failed_save_at_once_is_an_error(tmp_path: Path, monkeypatch):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft(), is_async=False)
    saved(saver, 1)
    monkeypatch.setattr(FileSystemWriter, "write_data", full_disk)
    with pytest.raises(CheckpointError, match=r"rank 0: .*No space left"):
        saver.save(Progress(2, 12))
    assert latest_checkpoint(run) == run.checkpoints / "step_1"


def test_the_record_of_the_best_survives_a_resume(tmp_path: Path):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    assert saver.best_accept_len == float("-inf")
    saver.save(Progress(1, 6, accept_len=2.5))
    for step in (2, 3, 4):
        saver.save(Progress(step, 6 * step))
    saver.wait()
    assert saver.best_accept_len == 2.5
    names = sorted(path.name for path in run.checkpoints.iterdir())
    assert names == ["best", "latest", "step_1", "step_3", "step_4"]

    resumed = checkpointer(run, tiny.draft())
    resumed.load(run.checkpoints / "step_4")
    assert resumed.best_accept_len == 2.5
    other = checkpointer(RunDir(tmp_path / "other"), tiny.draft())  # load_path of another run
    other.load(run.checkpoints / "step_4")
    assert other.best_accept_len == float("-inf")


def test_a_run_that_went_back_forgets_the_best_of_later(tmp_path: Path):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    saved(saver, 1)
    saver.save(Progress(2, 12, accept_len=2.5))
    saver.wait()
    run.latest_checkpoint.write_text("step_1\n")
    back = checkpointer(run, tiny.draft())
    back.load(run.checkpoints / "step_1")
    assert back.best_accept_len == float("-inf")
    saved(back, 2)  # in place of the best
    assert BestCheckpoint.read(run) is None


def test_what_a_late_evaluation_finds_is_added(tmp_path: Path):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    saver.save(Progress(1, 6, accept_len=2.0))
    waiting = Progress(2, 12, unreported={"train/loss": float("nan"), "train/lr": 0.1 + 0.2})
    saver.save(waiting)
    saver.wait()
    resumed = checkpointer(run, tiny.draft())
    found = resumed.load(run.checkpoints / "step_2")
    assert str(found) == str(waiting)  # NaN is no NaN's equal
    resumed.amend(Progress(2, 12, accept_len=2.5))
    assert resumed.best_accept_len == 2.5
    assert BestCheckpoint.read(run) == BestCheckpoint("step_2", 2.5)
    assert CheckpointMeta.read(run.checkpoints / "step_2").progress.accept_len == 2.5

    other = checkpointer(RunDir(tmp_path / "other"), tiny.draft())
    assert other.load(run.checkpoints / "step_2") == Progress(2, 12)  # evaluated on its own data


def test_a_head_that_is_not_trained_any_more(tmp_path: Path):
    draft = tiny.meta(1).draft
    saver = checkpointer(RunDir(tmp_path), tiny.draft(), draft=draft | {"freeze_lm_head": False})
    folder = saved(saver, 1)
    frozen = tiny.draft()
    frozen.lm_head.requires_grad_(requires_grad=False)
    loader = checkpointer(
        RunDir(tmp_path / "other"), frozen, draft=draft | {"freeze_lm_head": True}
    )
    with pytest.raises(UserError, match="another draft: freeze_lm_head False there, True here"):
        loader.load(folder)
    loader.load_weights(folder)


@pytest.mark.slow
def test_killed_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path):
    """The script saves twice, killed before each of its file operations, and loads the latest."""
    script = Path(__file__).with_name("killed_saves.py")
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environ,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    killed, latest = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert set(killed[:-1]) == {str(-signal.SIGKILL)}
    assert killed[-1] == "0"  # there was nothing left to be killed at
    # the checkpoint counts from some moment on, and never again does not
    assert list(latest) == sorted(latest)
    assert set(latest) == {"1", "2"}
