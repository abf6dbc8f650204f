"""Every loss: its value from its definition, its gradient from autograd of that definition."""

from __future__ import annotations

import typing
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchspec_hpc.config.objective_schema import LossName
from torchspec_hpc.drafts.losses import LOSSES, LossMix

ETA = 2.5


def overlap(q: Tensor, p: Tensor) -> Tensor:
    return torch.stack([q, p.expand_as(q)]).amin(0).sum(-1)


def hybrid(q: Tensor, p: Tensor, _: Tensor) -> Tensor:
    weight = (-ETA * overlap(q, p)).exp().detach()
    kl = (p * (p / q).log()).sum(-1)
    return weight * kl + (1 - weight) * 0.5 * (p - q).abs().sum(-1)


def data_token(q: Tensor, _: Tensor, token: Tensor) -> Tensor:
    picked = torch.stack(
        [q[:, i, t] if t >= 0 else torch.ones(len(q)) for i, t in enumerate(token)]
    )
    return -picked.log().T


DEFINITIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda q, p, _: -(p * q.log()).sum(-1),
    "reverse_kl": lambda q, p, _: (q * (q / p).log()).sum(-1),
    "cross_entropy": data_token,
    "total_variation": lambda q, p, _: 0.5 * (p - q).abs().sum(-1),
    "lk_alpha": lambda q, p, _: -overlap(q, p).log(),
    "lk_lambda": hybrid,
}


def case(vocab: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, t = (
        2 * torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)
        for shape in ((3, 4), (4,))
    )
    return z.requires_grad_(), t, torch.tensor([3, -1, 29, 0])


def check(mix: LossMix) -> None:
    z, t, token = case()
    value, gradient = mix(z.detach(), t, token)
    q, p = z.softmax(-1), t.softmax(-1)
    expected = sum(w * DEFINITIONS[name](q, p, token) for name, w in mix.weights)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient(name: str) -> None:
    check(LossMix(((name, 1.0),), ETA))


def test_a_mix_is_the_weighted_sum() -> None:
    check(LossMix((("forward_kl", 0.7), ("total_variation", 0.2), ("cross_entropy", 1.5)), ETA))


@pytest.mark.parametrize("name", LOSSES)
def test_a_perfect_draft(name: str) -> None:
    """All but the two cross entropies are 0 and flat where the distributions agree."""
    _, t, token = case()
    value, gradient = LossMix(((name, 1.0),))(t.expand(3, -1, -1), t, token)
    if name not in ("forward_kl", "cross_entropy"):
        torch.testing.assert_close(value, torch.zeros_like(value))
    if name != "cross_entropy":
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_finite_far_from_the_target(name: str) -> None:
    """Peaks of probability 1 at different tokens, where much underflows in float32."""
    t = torch.full((4, 30), -60.0)
    t[:, 7] = 60.0
    z = -t.expand(3, -1, -1)
    for part in LossMix(((name, 1.0),))(z, t, torch.tensor([7, 7, -1, 2])):
        assert part.isfinite().all()


def test_the_configuration_names_them_all() -> None:
    assert set(typing.get_args(LossName)) == set(LOSSES)
