from __future__ import annotations

import math

import pytest
import torch

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.training.step import StepResult
from torchspec_hpc.training.trainer import SkipLimit


def result(applied: bool) -> StepResult:
    return StepResult(torch.zeros(4, 1), 1.0 if applied else math.nan, applied, flagged=False)


def test_a_run_survives_bad_steps_but_not_too_many_in_a_row():
    skips = SkipLimit(3)
    for step in range(1, 3):
        skips.check(step, result(applied=False))
    skips.check(3, result(applied=True))
    for step in range(4, 6):
        skips.check(step, result(applied=False))
    message = "not finite in 3 steps in a row, up to step 6; training.max_skipped_steps = 3"
    with pytest.raises(TorchspecError, match=message):
        skips.check(6, result(applied=False))


def test_one_bad_step_may_be_too_many():
    with pytest.raises(TorchspecError, match="in 1 steps in a row"):
        SkipLimit(1).check(1, result(applied=False))
