from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.saved import assert_same_content, checkpointer, content
from torchspec_hpc.config import RunDir
from torchspec_hpc.config.checkpoint_files import latest_checkpoint
from torchspec_hpc.config.checkpoint_meta import Progress
from torchspec_hpc.errors import UserError

REPOSITORY = Path(__file__).parents[2]


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
    assert loader.load(folder) == Progress(3, 18, accept_len=2.0)
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


@pytest.mark.parametrize("strategy", ["full_shard", "replicate"])
def test_a_save_in_the_background_holds_what_one_at_once_holds(checked: Path, strategy: str):
    """The script has trained on before the one in the background was complete."""
    folders = [checked / strategy / part / "checkpoints" / "step_3" for part in ("", "sync")]
    found, expected = map(content, folders)
    assert_same_content(found, expected)
    assert {"rng.0.cpu", "rng.1.cpu"} < found.keys()


def assert_equal(draft: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter.full_tensor(), expected[name]), name
