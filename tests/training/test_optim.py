from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.training.tiny import training_config
from torchspec_hpc.training.optim import Schedule, build_optimizer, set_hyperparameters


def schedule(style: str = "cosine", **values: object) -> Schedule:
    settings = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_ratio": 0.1, "lr_decay_style": style}
    return Schedule.from_config(training_config(**settings | values), num_steps=100)


def test_warmup_rises_evenly_and_meets_the_decay():
    rates = [schedule()(step) for step in range(12)]
    assert rates[0] == pytest.approx(1 / 11)  # the first step already moves
    assert rates[9] == pytest.approx(10 / 11)
    assert rates[10] == 1.0
    assert rates[11] < 1.0


@pytest.mark.parametrize(
    ("style", "halfway", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_decay(style, halfway, end):
    rate = schedule(style)
    assert rate(55) == pytest.approx(halfway)  # half of the 90 steps after the warm-up
    assert rate(100) == pytest.approx(end)
    assert rate(10_000) == pytest.approx(end)
    assert rate(99) == pytest.approx(end, abs=0.01)


def test_cosine_and_linear_differ_in_between():
    assert schedule("cosine")(20) > schedule("linear")(20)
    assert schedule("cosine")(90) < schedule("linear")(90)


def test_no_warmup_starts_at_the_peak():
    assert schedule(warmup_ratio=0.0)(0) == 1.0


def test_warmup_only():
    rate = schedule(warmup_ratio=1.0)
    assert rate(99) == pytest.approx(100 / 101)
    assert rate(100) == 1.0
    assert rate(101) == pytest.approx(0.1)


def test_decay_may_end_before_the_run():
    assert schedule(lr_total_steps=50)(50) == pytest.approx(0.1)


def test_norms_are_not_decayed_and_the_configuration_wins():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2, bias=False))
    model.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    optimizer = build_optimizer(model, training_config(weight_decay=0.5))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(model[0].weight): 0.5, id(model[1].weight): 0.0}
    changed = training_config(weight_decay=0.25, adam_betas=[0.8, 0.9])
    set_hyperparameters(optimizer, changed, learning_rate=3.0)
    found = [(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(3.0, (0.8, 0.9), 0.25), (3.0, (0.8, 0.9), 0.0)]
