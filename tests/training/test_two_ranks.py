from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.training import tiny
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import Progress, latest_checkpoint
from torchspec_hpc.errors import UserError
from torchspec_hpc.training.checkpoint import Checkpointer, CheckpointError
from torchspec_hpc.training.optim import build_optimizer
from torchspec_hpc.training.parallel import World, shard

REPOSITORY = Path(__file__).parents[2]
ONE_RANK = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the checks on two ranks; the folder holds what they saved."""
    folder = tmp_path_factory.mktemp("two-ranks")
    launch = [sys.executable, "-m", "torchspec_hpc.training.launch", "--standalone"]
    script = [str(Path(__file__).with_name("two_ranks.py")), str(folder)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "--nproc-per-node", "2", *script], env=environ, timeout=200)
    assert done.returncode == 0
    return folder


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def checkpointer(run: RunDir, draft: torch.nn.Module, **meta: object) -> Checkpointer:
    config = tiny.training_config(learning_rate=1e-2)
    shard(draft, ONE_RANK, config)
    optimizer = build_optimizer(draft, config)
    ours = replace(tiny.meta(1), **meta)
    return Checkpointer(run, ONE_RANK, draft, optimizer, ours, seed=0, keep=2)


@pytest.mark.slow
def test_steps_on_two_ranks_are_those_of_one_process(checked: Path):
    """The script has compared them; see two_ranks.py."""
    assert (checked / "full_shard" / "checkpoints" / "step_3").is_dir()
    assert (checked / "replicate" / "checkpoints" / "step_3").is_dir()


@pytest.mark.parametrize("strategy", ["full_shard", "replicate"])
def test_one_rank_loads_what_two_saved(checked: Path, one_rank: None, strategy: str):
    run = RunDir(checked / strategy)
    draft = tiny.draft()
    loader = checkpointer(run, draft)
    folder = latest_checkpoint(run)
    assert folder is not None
    assert loader.load(folder) == Progress(3, 18)
    assert_equal(draft, torch.load(run.root / "expected.pt"))
    moments = loader._optimizer.state[draft.norm.weight]
    assert moments["step"] == 3
    assert moments["exp_avg"].full_tensor().abs().sum() > 0

    weights = tiny.draft()
    fresh = checkpointer(run, weights, stream={"dataset": "another"}, target="/models/other")
    fresh.load_weights(folder)
    assert_equal(weights, torch.load(run.root / "expected.pt"))
    assert not fresh._optimizer.state
    with pytest.raises(UserError, match="belongs to another target"):
        fresh.load(folder)


def test_random_state_goes_on(tmp_path: Path, one_rank: None):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    torch.manual_seed(5)
    folder = saver.save(Progress(1, 6))
    expected = torch.rand(3)
    saver.load(folder)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, one_rank: None, damage: str):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    folder = saver.save(Progress(1, 6))
    (data,) = folder.glob("*.distcp")
    if damage == "removed":
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint {folder}"):
        saver.load(folder)


def test_a_failed_save_leaves_the_one_before(tmp_path: Path, one_rank: None, monkeypatch):
    run = RunDir(tmp_path)
    saver = checkpointer(run, tiny.draft())
    saver.save(Progress(1, 6))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        saver.save(Progress(2, 12))
    assert latest_checkpoint(run) == run.checkpoints / "step_1"
    monkeypatch.undo()
    saver.save(Progress(2, 12))  # over what the failure left
    assert latest_checkpoint(run) == run.checkpoints / "step_2"


def assert_equal(draft: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
