from __future__ import annotations

import math

import pytest
import torch

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.training.step import StepResult
from torchspec_hpc.training.trainer import MAX_SKIPPED_IN_A_ROW, SkippedSteps


def result(applied: bool) -> StepResult:
    return StepResult(torch.zeros(4, 1), 1.0 if applied else math.nan, applied, flagged=False)


def test_a_run_survives_bad_steps_but_not_too_many_in_a_row():
    skipped = SkippedSteps()
    for step in range(1, MAX_SKIPPED_IN_A_ROW):
        skipped.count(step, result(applied=False))
    skipped.count(MAX_SKIPPED_IN_A_ROW, result(applied=True))
    assert (skipped.num_skipped, skipped.num_in_a_row) == (MAX_SKIPPED_IN_A_ROW - 1, 0)
    for step in range(21, 20 + MAX_SKIPPED_IN_A_ROW):
        skipped.count(step, result(applied=False))
    with pytest.raises(TorchspecError, match="not finite in 10 steps in a row, up to step 30"):
        skipped.count(30, result(applied=False))
