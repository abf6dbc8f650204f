from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from torchspec_hpc.config.checkpoint_files import (
    BestCheckpoint,
    find_checkpoint,
    latest_checkpoint,
    latest_step,
    publish,
    recall_best,
)
from torchspec_hpc.config.checkpoint_meta import CheckpointMeta, Progress
from torchspec_hpc.config.rundir import RunDir
from torchspec_hpc.errors import UserError

META = CheckpointMeta(
    step=3,
    cursor=12,
    draft={"algorithm": "eagle3", "config": {"aux_layers": (1, 2), "hidden_size": 8}},
    target="/models/x",
    stream={"dataset": "abc", "num_samples": 10, "seed": 0, "shuffle": True},
    world_size=2,
    skipped=1,
)


def complete(run: RunDir, step: int, keep: int = 2, accept_len: float | None = None) -> None:
    folder = run.checkpoints / f"step_{step}"
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True)
    publish(run, temporary, folder, keep, accept_len)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def test_newest_are_kept_by_number_not_by_name(tmp_path: Path):
    run = RunDir(tmp_path)
    assert latest_checkpoint(run) is None
    for step in (8, 9, 10, 11):
        complete(run, step)
    assert names(run) == ["latest", "step_10", "step_11"]
    assert latest_checkpoint(run) == run.checkpoints / "step_11"


def test_the_latest_stays_even_if_others_have_higher_numbers(tmp_path: Path):
    run = RunDir(tmp_path)
    for step in (20, 30, 5):  # resumed by hand from an older one
        complete(run, step)
    assert "step_5" in names(run)
    assert latest_checkpoint(run) == run.checkpoints / "step_5"


def test_the_best_stays_and_is_found(tmp_path: Path):
    run = RunDir(tmp_path)
    assert BestCheckpoint.read(run) is None
    with pytest.raises(UserError, match="best holds no checkpoint"):
        find_checkpoint(run.best_checkpoint)
    complete(run, 1)
    complete(run, 2, accept_len=2.5)
    for step in (3, 4, 5):
        complete(run, step)
    assert names(run) == ["best", "latest", "step_2", "step_4", "step_5"]
    assert BestCheckpoint.read(run) == BestCheckpoint("step_2", 2.5)
    assert find_checkpoint(run.best_checkpoint) == run.checkpoints / "step_2"
    assert find_checkpoint(run.latest_checkpoint) == run.checkpoints / "step_5"
    complete(run, 6, accept_len=2.6)
    assert names(run) == ["best", "latest", "step_5", "step_6"]


@pytest.mark.parametrize(
    ("accept_len", "best"),
    [(None, ("step_1", 1.5)), (1.25, ("step_1", 1.5)), (2.5, ("step_2", 2.5))],
)
def test_a_best_that_was_not_written_down_is_mended(
    tmp_path: Path, accept_len: float | None, best: tuple[str, float]
):
    run = RunDir(tmp_path)
    complete(run, 1, accept_len=1.5)
    complete(run, 2)  # killed between moving `latest` and `best`
    meta = replace(META, step=2, accept_len=accept_len)
    assert recall_best(run, run.checkpoints / "step_2", meta) == best[1]
    assert BestCheckpoint.read(run) == BestCheckpoint(*best)


def test_a_best_of_later_does_not_count(tmp_path: Path):
    run = RunDir(tmp_path)
    complete(run, 1)
    complete(run, 2, accept_len=2.5)
    meta = replace(META, step=1)
    assert recall_best(run, run.checkpoints / "step_1", meta) == float("-inf")
    known = replace(meta, accept_len=1.5)
    assert recall_best(run, run.checkpoints / "step_1", known) == 1.5
    assert BestCheckpoint.read(run) == BestCheckpoint("step_1", 1.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("step_1", "cannot read .*best"),
        ('{"checkpoint": "step_1"}', "KeyError.*accept_len"),
        ('{"checkpoint": "step_7", "accept_len": 2}', "names step_7, which is not there"),
    ],
)
def test_a_damaged_best_is_an_error(tmp_path: Path, content: str, message: str):
    run = RunDir(tmp_path)
    complete(run, 1)
    run.best_checkpoint.write_text(content)
    with pytest.raises(UserError, match=message):
        BestCheckpoint.read(run)


def test_what_an_attempt_left_before_moving_latest_is_replaced(tmp_path: Path):
    run = RunDir(tmp_path)
    complete(run, 1)
    (run.checkpoints / "step_2").mkdir()
    (run.checkpoints / "step_2" / "old").touch()
    complete(run, 2)
    assert list((run.checkpoints / "step_2").iterdir()) == []


def test_an_unfinished_checkpoint_is_never_the_latest(tmp_path: Path):
    run = RunDir(tmp_path)
    complete(run, 1)
    (run.checkpoints / "step_2.tmp").mkdir()
    assert latest_checkpoint(run) == run.checkpoints / "step_1"


def test_a_dangling_latest_is_an_error(tmp_path: Path):
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    run.latest_checkpoint.write_text("step_7\n")
    with pytest.raises(UserError, match="names step_7, which is not there"):
        latest_checkpoint(run)


def test_latest_step(tmp_path: Path):
    run = RunDir(tmp_path)
    assert latest_step(run) == 0
    complete(run, 30)
    assert latest_step(run) == 30
    run.latest_checkpoint.write_text("best\n")
    with pytest.raises(UserError, match=r"latest holds 'best'"):
        latest_step(run)


def test_a_checkpoint_is_found_from_where_one_points(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="holds no checkpoint"):
        find_checkpoint(run.root)
    complete(run, 1)
    complete(run, 2)
    META.write(run.checkpoints / "step_1")
    assert find_checkpoint(run.root) == run.checkpoints / "step_2"
    assert find_checkpoint(run.checkpoints) == run.checkpoints / "step_2"
    assert find_checkpoint(run.checkpoints / "step_1") == run.checkpoints / "step_1"
    with pytest.raises(UserError, match="step_2 holds no checkpoint"):  # without meta.json
        find_checkpoint(run.checkpoints / "step_2")


def test_meta_survives_the_file(tmp_path: Path):
    META.write(tmp_path)
    found = CheckpointMeta.read(tmp_path)
    assert found.progress == Progress(step=3, cursor=12, skipped=1)
    found.check_continues(META, tmp_path)


def test_weights_fit_whatever_is_trained_of_them(tmp_path: Path):
    draft = META.draft | {"freeze_lm_head": True}
    META.write(tmp_path)
    found = CheckpointMeta.read(tmp_path)
    found.check_weights(replace(META, draft=draft, target="/models/y", stream={}), tmp_path)
    with pytest.raises(UserError, match="another draft: freeze_lm_head None there, True here"):
        found.check_continues(replace(META, draft=draft), tmp_path)
    with pytest.raises(UserError, match="another draft: algorithm 'eagle3' there, 'x' here"):
        found.check_weights(replace(META, draft=draft | {"algorithm": "x"}), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "/models/y"}, "belongs to another target: '/models/x' there, '/models/y' here"),
        (
            {"stream": META.stream | {"seed": 1}},
            "belongs to another stream: seed 0 there, 1 here",
        ),
        (
            {"draft": {"algorithm": "eagle3", "config": {"aux_layers": (1, 3), "hidden_size": 8}}},
            r"another draft: config aux_layers \[1, 2\] there, \[1, 3\] here",
        ),
    ],
)
def test_another_run_is_refused(tmp_path: Path, change, message):
    META.write(tmp_path)
    ours = replace(META, **change)
    with pytest.raises(UserError, match=message):
        CheckpointMeta.read(tmp_path).check_continues(ours, tmp_path)


def test_no_checkpoint_and_another_format(tmp_path: Path):
    with pytest.raises(UserError, match="is not a complete checkpoint"):
        CheckpointMeta.read(tmp_path)
    (tmp_path / "meta.json").write_text("[]")
    with pytest.raises(UserError, match=r"another format \(None\)"):
        CheckpointMeta.read(tmp_path)
    META.write(tmp_path)
    content = json.loads((tmp_path / "meta.json").read_text())
    for version in (2, 99):
        (tmp_path / "meta.json").write_text(json.dumps(content | {"format_version": version}))
        with pytest.raises(UserError, match=rf"another format \({version}\)"):
            CheckpointMeta.read(tmp_path)
