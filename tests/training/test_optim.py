from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests.training.tiny import training_config
from torchspec_hpc.training.optim import Schedule, build_optimizer, set_hyperparameters


def schedule(style: str = "cosine", **values: object) -> Schedule:
    """10 steps of warm-up to 1.0, 90 of decay to 0.1."""
    settings = {"learning_rate": 1.0, "warmup_ratio": 0.1, "lr_decay_style": style}
    settings["min_lr"] = None if style == "constant" else 0.1
    return Schedule.from_config(training_config(**settings | values), num_steps=100)


@pytest.mark.parametrize("style", ["cosine", "linear", "constant", "inverse-square-root", "WSD"])
def test_warmup_rises_evenly_and_meets_the_peak(style):
    rate = schedule(style)
    assert rate(0) == pytest.approx(1 / 11)  # the first step already moves
    assert rate(9) == pytest.approx(10 / 11)
    assert rate(10) == 1.0


@pytest.mark.parametrize(
    ("style", "first", "halfway", "last", "end"),
    [
        (
            "cosine",
            0.1 + 0.9 * (1 + math.cos(math.pi / 90)) / 2,
            0.55,
            0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2,
            0.1,
        ),
        ("linear", 0.1 + 0.9 * 89 / 90, 0.55, 0.1 + 0.9 / 90, 0.1),
        ("constant", 1.0, 1.0, 1.0, 1.0),
    ],
)
def test_decay(style, first, halfway, last, end):
    rate = schedule(style)
    assert rate(11) == pytest.approx(first)
    assert rate(55) == pytest.approx(halfway)  # half of the 90 steps after the warm-up
    assert rate(99) == pytest.approx(last)
    assert rate(100) == pytest.approx(end)
    assert rate(10_000) == pytest.approx(end)


def test_inverse_square_root_goes_on_until_the_floor():
    rate = schedule("inverse-square-root")
    assert rate(43) == pytest.approx(math.sqrt(11 / 44))  # 4 times as many steps: half
    assert rate(99) == pytest.approx(math.sqrt(11 / 100))
    assert rate(100) == pytest.approx(math.sqrt(11 / 101))  # no jump where the run ends
    assert rate(1098) == pytest.approx(math.sqrt(11 / 1099))
    assert rate(1099) == pytest.approx(0.1)
    assert rate(10_000) == 0.1
    assert schedule("inverse-square-root", warmup_ratio=0.0)(0) == 1.0


@pytest.mark.parametrize(
    ("style", "first", "halfway", "last"),
    [
        ("linear", 39 / 40, 1 / 2, 1 / 40),
        ("cosine", (1 + math.cos(math.pi / 40)) / 2, 1 / 2, (1 - math.cos(math.pi / 40)) / 2),
        ("exponential", 2 * 0.5 ** (1 / 40) - 1, math.sqrt(2) - 1, 2 * 0.5 ** (39 / 40) - 1),
        ("minus_sqrt", 1 - math.sqrt(1 / 40), 1 - math.sqrt(1 / 2), 1 - math.sqrt(39 / 40)),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_wsd_holds_the_peak_and_decays_at_the_end(style, first, halfway, last, floor):
    rate = schedule("WSD", lr_wsd_decay_ratio=0.4, lr_wsd_decay_style=style, min_lr=floor)
    assert {rate(n) for n in range(10, 61)} == {1.0}
    assert rate(61) == pytest.approx(floor + (1 - floor) * first)
    assert rate(80) == pytest.approx(floor + (1 - floor) * halfway)
    assert rate(99) == pytest.approx(floor + (1 - floor) * last)
    assert rate(100) == pytest.approx(floor)
    assert rate(10_000) == pytest.approx(floor)


def test_wsd_by_itself_is_a_cosine_over_the_last_fifth():
    rate = schedule("WSD")
    assert rate(80) == 1.0
    assert rate(90) == pytest.approx(0.55)


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_wsd_may_have_nothing_to_hold(ratio):
    rate = schedule(
        "WSD", warmup_ratio=1 - ratio, lr_wsd_decay_ratio=ratio, lr_wsd_decay_style="linear"
    )
    start = round(100 * (1 - ratio))
    assert rate(start) == 1.0
    assert rate(start + 1) == pytest.approx(1 - 0.9 / (100 * ratio))


def test_no_warmup_starts_at_the_peak():
    assert schedule(warmup_ratio=0.0)(0) == 1.0


def test_warmup_only():
    rate = schedule(warmup_ratio=1.0)
    assert rate(99) == pytest.approx(100 / 101)
    assert rate(100) == 1.0
    assert rate(101) == pytest.approx(0.1)


def test_decay_may_end_before_the_run():
    assert schedule(lr_total_steps=50)(50) == pytest.approx(0.1)


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(7, 5, bias=False), nn.LayerNorm(5, bias=False))
    made.register_parameter("frozen", nn.Parameter(torch.ones(2), requires_grad=False))
    return made


def test_norms_are_not_decayed_and_the_configuration_wins():
    net = model()
    optimizer = build_optimizer(net, training_config(weight_decay=0.5))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {id(net[0].weight): 0.5, id(net[1].weight): 0.0}
    changed = training_config(weight_decay=0.25, adam_betas=[0.8, 0.9])
    set_hyperparameters(optimizer, changed, learning_rate=3.0)
    found = [(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(3.0, (0.8, 0.9), 0.25), (3.0, (0.8, 0.9), 0.0)]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        net(torch.randn(3, 7, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_fused_update_is_adamw():
    config = training_config(weight_decay=0.5, learning_rate=0.01)
    net, plain = model(), model()
    train(net, build_optimizer(net, config), range(20))
    groups = [
        {"params": [plain[0].weight], "weight_decay": 0.5},
        {"params": [plain[1].weight], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=0.01, betas=config.adam_betas, foreach=False, fused=False)
    train(plain, adamw, range(20))
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_fused_update_goes_on_with_the_same_bits():
    config = training_config(learning_rate=0.01)
    net = model()
    optimizer = build_optimizer(net, config)
    train(net, optimizer, range(3))
    other = copy.deepcopy(net)
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # else shared
    train(net, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
