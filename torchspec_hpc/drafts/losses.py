"""Losses between the draft's distribution q and the target's distribution P, by name.

Every loss is a value per prediction and its gradient with respect to the draft's logits z, written
out by hand: the fused head forms the gradient in the forward pass, chunk by chunk.
``q = softmax(z)``; P is constant.  ``alpha = sum_v min(P_v, q_v)`` is the probability that
speculative sampling accepts the draft's token (https://arxiv.org/abs/2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

#: Value [K, C] and gradient with respect to the logits [K, C, V].
ValueAndGradient = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prediction:
    """What losses are made of; each part is computed once.

    K TTT steps predict each of C targets over V tokens.

    Attributes:
        logits: [K, C, V], z, float32 or better.
        target_logits: [C, V].
        token: [C] int64, the data's token in the draft's vocabulary; -1 where it is not.
        lk_eta: How fast the hybrid LK loss turns from KL to total variation.
    """

    logits: Tensor
    target_logits: Tensor
    token: Tensor
    lk_eta: float

    @cached_property
    def log_q(self) -> Tensor:
        """[K, C, V]."""
        return self.logits.log_softmax(-1)

    @cached_property
    def q(self) -> Tensor:
        """[K, C, V]."""
        return self.log_q.exp()

    @cached_property
    def log_p(self) -> Tensor:
        """[C, V]."""
        return self.target_logits.log_softmax(-1)

    @cached_property
    def p(self) -> Tensor:
        """[C, V]."""
        return self.log_p.exp()

    @cached_property
    def alpha(self) -> Tensor:
        """[K, C], acceptance rate of each prediction."""
        return torch.minimum(self.p, self.q).sum(-1)

    @cached_property
    def d_alpha(self) -> Tensor:
        """[K, C, V], ``d alpha / d z_v = q_v ([q_v < P_v] - sum_u q_u [q_u < P_u])``."""
        below = (self.q < self.p).to(self.q.dtype)
        return self.q * (below - (self.q * below).sum(-1, keepdim=True))


def forward_kl(x: Prediction) -> ValueAndGradient:
    """Soft cross entropy ``-sum_v P_v log q_v``: KL(P || q) up to a constant.

    Gradient ``q - P``.
    """
    return -(x.p * x.log_q).sum(-1), x.q - x.p


def reverse_kl(x: Prediction) -> ValueAndGradient:
    """``KL(q || P) = sum_v q_v (log q_v - log P_v)``.

    Gradient ``q_v (log q_v - log P_v - KL)``.
    """
    ratio = x.log_q - x.log_p
    value = (x.q * ratio).sum(-1)
    return value, x.q * (ratio - value[..., None])


def cross_entropy(x: Prediction) -> ValueAndGradient:
    """``-log q_token`` of the data's own token.

    Gradient ``q - onehot``; both are 0 where the draft's vocabulary lacks the token.
    """
    known = (x.token >= 0).to(x.q.dtype)  # [C]
    index = x.token.clamp(min=0).expand(x.q.shape[:-1])[..., None]  # [K, C, 1]
    value = -x.log_q.gather(-1, index)[..., 0] * known
    onehot = torch.zeros_like(x.q).scatter_(-1, index, 1.0)
    return value, (x.q - onehot) * known[:, None]


def total_variation(x: Prediction) -> ValueAndGradient:
    """``TV(P, q) = 1/2 sum_v |P_v - q_v| = 1 - alpha``: the probability of a rejection.

    Gradient ``-d alpha``.
    """
    return 1.0 - x.alpha, -x.d_alpha


def lk_alpha(x: Prediction) -> ValueAndGradient:
    """``-log alpha``, the likelihood of acceptance (https://arxiv.org/abs/2602.23881).

    Gradient ``-d alpha / alpha``.
    """
    alpha = x.alpha.clamp(min=torch.finfo(x.q.dtype).tiny)
    return -alpha.log(), -x.d_alpha / alpha[..., None]


def lk_lambda(x: Prediction) -> ValueAndGradient:
    """``lambda KL(P || q) + (1 - lambda) TV(P, q)`` (https://arxiv.org/abs/2602.23881).

    ``lambda = exp(-eta alpha)`` per prediction, a constant to the gradient: KL where they hardly
    overlap, total variation where they do.
    """
    weight = torch.exp(-x.lk_eta * x.alpha)
    kl = (x.p * (x.log_p - x.log_q)).sum(-1)
    value = weight * kl + (1 - weight) * (1 - x.alpha)
    weight = weight[..., None]
    return value, weight * (x.q - x.p) - (1 - weight) * x.d_alpha


LOSSES: dict[str, Callable[[Prediction], ValueAndGradient]] = {
    loss.__name__: loss
    for loss in (forward_kl, reverse_kl, cross_entropy, total_variation, lk_alpha, lk_lambda)
}


@dataclass(frozen=True)
class LossMix:
    """A weighted sum of losses.

    Attributes:
        weights: Pairs of a name of :data:`LOSSES` and its weight.
        lk_eta: See :func:`lk_lambda`; 3 is the paper's best.
    """

    weights: tuple[tuple[str, float], ...]
    lk_eta: float = 3.0

    @property
    def is_forward_kl(self) -> bool:
        """Whether this is the default, for which there is a faster form."""
        return self.weights == (("forward_kl", 1.0),)

    def __call__(self, logits: Tensor, target_logits: Tensor, token: Tensor) -> ValueAndGradient:
        """Value [K, C] and gradient [K, C, V]; the arguments are :class:`Prediction`'s."""
        prediction = Prediction(logits, target_logits, token, self.lk_eta)
        parts = [(weight, LOSSES[name](prediction)) for name, weight in self.weights]
        value = sum((w * part[0] for w, part in parts), start=torch.zeros_like(logits[..., 0]))
        gradient = sum((w * part[1] for w, part in parts), start=torch.zeros_like(logits))
        return value, gradient


FORWARD_KL = LossMix((("forward_kl", 1.0),))
