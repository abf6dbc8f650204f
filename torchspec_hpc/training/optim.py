"""AdamW on float32 master weights, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from torchspec_hpc.config.schema import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then decay from `peak` to `floor`.

    A pure function of the step: a resumed run needs no scheduler state, and a
    changed configuration takes effect at once.

    Attributes:
        peak: Highest learning rate, of step `warmup_steps`.
        floor: Learning rate from `total_steps` on.
        warmup_steps: Steps below the peak.
        total_steps: Where the decay ends.
        style: Shape of the decay; ``constant`` stays at the peak.
    """

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int
    style: Literal["cosine", "linear", "constant"]

    @classmethod
    def from_config(cls, config: TrainingConfig, num_steps: int) -> Schedule:
        """Reads the schedule of a run of `num_steps` optimizer steps."""
        total_steps = config.lr_total_steps or num_steps
        return cls(
            peak=config.learning_rate,
            floor=config.min_lr,
            warmup_steps=round(config.warmup_ratio * total_steps),
            total_steps=total_steps,
            style=config.lr_decay_style,
        )

    def __call__(self, step: int) -> float:
        """The learning rate of a step; steps count from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        if self.style == "constant":
            return self.peak
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        share = 1.0 - progress
        if self.style == "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.floor + (self.peak - self.floor) * share


def build_optimizer(draft: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; norms (vectors) are not decayed.

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
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.adam_betas)


def set_hyperparameters(
    optimizer: torch.optim.AdamW, config: TrainingConfig, learning_rate: float
) -> None:
    """Makes the configuration win over what a checkpoint brought into the optimizer."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0), strict=True):
        group["lr"] = learning_rate
        group["betas"] = config.adam_betas
        group["weight_decay"] = weight_decay
