"""AdamW on float32 master weights, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from torchspec_hpc.config.optim_schema import DecayStyle, OptimConfig, WsdDecayStyle


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then a decay towards `floor`.

    A pure function of the number of updates made so far, ``n``: a resumed run needs no
    scheduler state, and a changed configuration takes effect at once.  With W warm-up
    steps, T steps in all and the last D of them for WSD's decay::

        n < W                  peak * (n + 1) / (W + 1)
        constant               peak
        inverse-square-root    max(floor, peak * sqrt((W + 1) / (n + 1))), also beyond T
        all others             floor + (peak - floor) * share(p), with p held within [0, 1]

        linear, cosine         p = (n - W) / (T - W)
        WSD                    p = (n - (T - D)) / D: the peak until T - D

        linear                 share(p) = 1 - p
        cosine                 share(p) = (1 + cos(pi * p)) / 2
        exponential            share(p) = 2 * 0.5**p - 1, which ends at 0 whatever the floor
        minus_sqrt             share(p) = 1 - sqrt(p)

    The shapes are Megatron-LM's (``megatron/core/optimizer_param_scheduler.py``), one step
    earlier: the first step moves the weights, and step W is the first at the peak.

    Attributes:
        peak: Highest learning rate, of step `warmup_steps`.
        floor: Learning rate from `total_steps` on.
        warmup_steps: Steps below the peak, W.
        total_steps: Where the decay ends, T.
        style: Shape of the decay.
        wsd_decay_steps: The last steps, those in which WSD decays, D.
        wsd_style: Shape of that decay.
    """

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    style: DecayStyle
    wsd_decay_steps: int
    wsd_style: WsdDecayStyle

    @classmethod
    def from_config(cls, config: OptimConfig, num_steps: int) -> Schedule:
        """Reads the schedule of a run of `num_steps` optimizer steps."""
        total_steps = config.lr_total_steps or num_steps
        return cls(
            peak=config.learning_rate,
            floor=config.lowest_lr,
            warmup_steps=round(config.warmup_ratio * total_steps),
            total_steps=total_steps,
            style=config.lr_decay_style,
            wsd_decay_steps=round(config.wsd_decay_ratio * total_steps),
            wsd_style=config.lr_wsd_decay_style or "cosine",
        )

    def __call__(self, num_updates: int) -> float:
        """The learning rate of the update that follows `num_updates` others."""
        if num_updates < self.warmup_steps:
            return self.peak * (num_updates + 1) / (self.warmup_steps + 1)
        if self.style == "constant":
            return self.peak
        if self.style == "inverse-square-root":
            scale = math.sqrt((self.warmup_steps + 1) / (num_updates + 1))
            return max(self.floor, self.peak * scale)
        if self.style == "WSD":
            share = _remaining(self.wsd_style, self._progress(num_updates, self.wsd_decay_steps))
        else:
            decay_steps = self.total_steps - self.warmup_steps
            share = _remaining(self.style, self._progress(num_updates, decay_steps))
        return self.floor + (self.peak - self.floor) * share

    def _progress(self, num_updates: int, decay_steps: int) -> float:
        """How far a decay in the last `decay_steps` is, 0 to 1."""
        into_decay = num_updates - (self.total_steps - decay_steps)
        return min(1.0, max(0.0, into_decay / max(1, decay_steps)))


def _remaining(style: WsdDecayStyle, progress: float) -> float:
    """Share of the way from floor to peak that is left at `progress`; both are 0 to 1."""
    if style == "linear":
        return 1.0 - progress
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if style == "exponential":
        return float(2.0 * 0.5**progress - 1.0)
    return 1.0 - math.sqrt(progress)


def build_optimizer(draft: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms (vectors) are not decayed.

    Fused: one kernel updates weights and moments in place of a dozen.  For 37 M parameters in
    float32 that is 23 ms instead of 216 on one CPU core, and 1.1 instead of 1.9 on an H100.

    Args:
        draft: The draft, sharded already, with float32 parameters.
        config: Betas and weight decay.  The learning rate is set step by step.
    """
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas, fused=True)


def set_hyperparameters(
    optimizer: torch.optim.AdamW, config: OptimConfig, learning_rate: float
) -> None:
    """Makes the configuration win over what a checkpoint brought into the optimizer."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group["lr"] = learning_rate
        group["betas"] = config.adam_betas
        group["weight_decay"] = weight_decay
