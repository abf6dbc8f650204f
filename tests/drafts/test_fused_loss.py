"""The fused head against a table of logits and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec_hpc.drafts.fused_loss import FusedLoss, Targets, fused_loss
from torchspec_hpc.drafts.losses import FORWARD_KL, LOSSES, LossMix
from torchspec_hpc.drafts.target_head import TargetHead

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
K, V, H = 3, 37, 16
SCALE = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)


def make(
    num_targets: int = 11, dtype: torch.dtype = torch.float64, device: str = "cpu", vocab: int = V
) -> tuple[Tensor, Tensor, Targets]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.randn(shape, generator=generator, dtype=torch.float64)
        return made.to(device, dtype)

    num_states = 40
    pairs = torch.randperm(K * num_targets, generator=generator).view(K, num_targets)
    pairs = torch.where(pairs < num_states, pairs, num_states).to(device)  # some do not exist
    pairs[1, :2] = num_states
    head = TargetHead(1 + 0.1 * normal(H), normal(vocab, H), 1e-5)
    token = torch.randint(-1, vocab, (num_targets,), generator=generator).to(device)
    targets = Targets(head, normal(num_targets, H), token, pairs)
    return normal(num_states, H).requires_grad_(), normal(vocab, H).requires_grad_(), targets


def plain(states: Tensor, weight: Tensor, targets: Targets, mix: LossMix) -> FusedLoss:
    """Everything at once; gradients are autograd's, of values that losses have tests of."""
    target_logits = targets.head.logits(targets.last).to(states.dtype)
    exists = targets.pairs < len(states)
    padded = torch.cat([states, states.new_zeros(1, H)])
    logits = F.linear(padded[targets.pairs.clamp(max=len(states))], weight)
    value, gradient = mix(logits.detach(), target_logits, targets.token)
    surrogate = (gradient * logits).sum(-1) * exists  # has the loss's gradient
    loss = ((value - surrogate.detach() + surrogate) * exists).sum(1) @ SCALE.to(states)
    correct = ((logits.argmax(-1) == target_logits.argmax(-1)) & exists).sum(1)
    return FusedLoss(loss, (value * exists).sum(1), correct)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * K * V * 4, None], ids=["one", "four", "all"])
@pytest.mark.parametrize("name", LOSSES)
def test_matches_the_plain_form(name: str, chunk_bytes: int | None) -> None:
    mix = LossMix(((name, 1.0),))
    states, weight, targets = make()
    found = fused_loss(states, weight, targets, SCALE, mix, chunk_bytes=chunk_bytes)
    expected = plain(states, weight, targets, mix)
    torch.testing.assert_close(found.loss_sums, expected.loss_sums.detach())
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.correct.tolist() == expected.correct.tolist()
    for a, b in zip(
        torch.autograd.grad(3 * found.loss, (states, weight)),
        torch.autograd.grad(3 * expected.loss, (states, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    *inputs, targets = make(4)
    mix = LossMix(((name, 1.0),), lk_eta=0.0)  # with eta lambda is taken for a constant
    gradients = torch.autograd.grad(fused_loss(*inputs, targets, SCALE, mix).loss, inputs)
    for which, gradient in enumerate(gradients):
        direction, losses = torch.randn_like(gradient), []
        for epsilon in (1e-6, -1e-6):
            moved = [x.detach() for x in inputs]
            moved[which] = moved[which] + epsilon * direction
            losses.append(fused_loss(*moved, targets, SCALE, mix).loss)
        numeric = (losses[0] - losses[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-9)


def test_gradients_serve_one_backward_pass() -> None:
    states, weight, targets = make()
    loss = fused_loss(states, weight, targets, SCALE, FORWARD_KL).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_a_frozen_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets = make()
    expected = torch.autograd.grad(
        fused_loss(states, weight, targets, SCALE, FORWARD_KL).loss, states
    )
    frozen = weight.detach()
    # neither here nor where nobody will ask is one computed
    monkeypatch.setattr("torchspec_hpc.drafts.fused_loss._add_product", pytest.fail)
    loss = fused_loss(states, frozen, targets, SCALE, FORWARD_KL).loss
    torch.testing.assert_close(torch.autograd.grad(loss, states), expected)
    with torch.no_grad():
        measured = fused_loss(states, weight, targets, SCALE, FORWARD_KL)
    assert not measured.loss.requires_grad
    torch.testing.assert_close(measured.loss, loss.detach())


@pytest.mark.parametrize("num_targets", [0, 11])
def test_predictions_that_do_not_exist_count_for_nothing(num_targets: int) -> None:
    states, weight, targets = make(num_targets)
    nothing = targets._replace(pairs=torch.full_like(targets.pairs, len(states)))
    found = fused_loss(states, weight, nothing, SCALE, FORWARD_KL)
    assert found.loss.item() == found.loss_sums.abs().sum() == found.correct.sum() == 0
    for gradient in torch.autograd.grad(found.loss, (states, weight)):
        assert not gradient.any()


def test_low_precision_logits_give_a_float32_loss() -> None:
    states, weight, targets = make(dtype=torch.bfloat16)
    exact = make()
    found = fused_loss(states, weight, targets, SCALE, FORWARD_KL)
    assert found.loss.dtype == torch.float64
    torch.testing.assert_close(
        found.loss, fused_loss(*exact, SCALE, FORWARD_KL).loss, rtol=0.02, atol=0
    )
    for a, b in zip(
        torch.autograd.grad(found.loss, (states, weight)),
        torch.autograd.grad(fused_loss(*exact, SCALE, FORWARD_KL).loss, exact[:2]),
        strict=True,
    ):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() / b.norm() < 0.03


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward_kl", "lk_lambda"])
def test_matches_the_plain_form_on_a_gpu(name: str, dtype: torch.dtype, compiled: bool) -> None:
    mix = LossMix(((name, 1.0),))
    states, weight, targets = make(dtype=dtype, device="cuda", vocab=1000)
    exact = plain(*(x.detach().double().requires_grad_() for x in (states, weight)), targets, mix)
    found = fused_loss(
        states, weight, targets, SCALE.cuda(), mix, compiled=compiled, chunk_bytes=4 * K * 1000 * 3
    )
    limit = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.loss_sums, exact.loss_sums, rtol=limit, atol=limit)
