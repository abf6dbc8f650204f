"""What is learned from the same documents must not depend on how they were cut."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training import tiny
from tests.training.token_weighting import NUM_DOCUMENTS, cuts

REPOSITORY = Path(__file__).parents[2]


def parameters(num_ranks: int, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of each cut, after the steps of token_weighting.py."""
    launch = [sys.executable, "-m", "torchspec_hpc.training.launch", "--standalone"]
    script = [str(Path(__file__).with_name("token_weighting.py")), str(folder)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [*launch, "--nproc-per-node", str(num_ranks), *script]
    assert subprocess.run(command, env=environ, timeout=200).returncode == 0
    return torch.load(folder / f"{num_ranks}.pt")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """One rank, one pack."""
    first, *others = parameters(1, tmp_path_factory.mktemp("one-rank"))
    check(others, first)
    return first


def check(found: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> None:
    start = {name: p.detach() for name, p in tiny.draft().named_parameters()}
    num_moved = 0
    for parameters_of_cut in found:
        assert parameters_of_cut.keys() == expected.keys()
        for name, value in parameters_of_cut.items():
            moved = float((expected[name] - start[name]).norm())
            num_moved += moved > 1e-3
            assert float((value - expected[name]).norm()) <= 1e-5 * moved + 1e-6, name
    assert num_moved >= 8 * len(found)  # else the comparison would be of noise


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_each_cut_has_every_document_once(num_ranks: int):
    for cut in cuts(num_ranks):
        assert len({len(packs) for packs in cut}) == 1  # as many micro-batches on every rank
        documents = [i for packs in cut for pack in packs for i in pack]
        assert sorted(documents) == list(range(NUM_DOCUMENTS))


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_gradient_does_not_depend_on_the_cut(
    num_ranks: int, expected: dict[str, torch.Tensor], tmp_path: Path
):
    check(parameters(num_ranks, tmp_path), expected)
