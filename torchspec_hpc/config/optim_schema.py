"""Settings of the optimizer and its learning rate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from torchspec_hpc.config.types import Section

DecayStyle = Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["linear", "cosine", "exponential", "minus_sqrt"]

#: Of ``lr_total_steps``, where WSD is asked for without ``lr_wsd_decay_ratio``.
_WSD_DECAY_RATIO = 0.2


class OptimConfig(Section):
    """The part of ``training`` that says how gradients change weights.

    :class:`torchspec_hpc.training.optim.Schedule` has the formulas.
    """

    learning_rate: float = Field(1e-4, gt=0, description="AdamW's, at its peak.")
    min_lr: float | None = Field(
        None, ge=0, description="Learning rate that no decay goes below; null: 0."
    )
    lr_decay_style: DecayStyle = Field(
        "cosine",
        description="From learning_rate to min_lr; constant: no decay; WSD: constant, then a decay"
        " at the end.",
    )
    lr_wsd_decay_ratio: float | None = Field(
        None,
        gt=0,
        le=1,
        description="WSD: share of lr_total_steps, the last ones, that decay; null: 0.2.",
    )
    lr_wsd_decay_style: WsdDecayStyle | None = Field(
        None, description="WSD: shape of its decay, minus_sqrt is 1 - sqrt; null: cosine."
    )
    lr_total_steps: int | None = Field(
        None, ge=1, description="Steps until the decay ends; null: the length of the run."
    )
    warmup_ratio: float = Field(
        0.015, ge=0, le=1, description="Share of lr_total_steps with a linear warm-up; 0: none."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, of matrices only; 0: none.")
    adam_betas: Annotated[tuple[float, float], BeforeValidator(lambda v: tuple(v))] = Field(
        (0.9, 0.95), description="Decay rates of AdamW's first and second moment."
    )
    max_grad_norm: float = Field(0.5, gt=0, description="Clips gradients; 1e9: as good as off.")
    max_skipped_steps: int = Field(
        10, ge=1, description="So many steps in a row without a finite gradient end the run."
    )

    @property
    def wsd_decay_ratio(self) -> float:
        """Share of the schedule in which WSD decays."""
        return self.lr_wsd_decay_ratio or _WSD_DECAY_RATIO

    @property
    def lowest_lr(self) -> float:
        """Where the decay ends."""
        return self.min_lr or 0.0

    @model_validator(mode="after")
    def _has_a_floor_below_the_peak(self) -> OptimConfig:
        if self.min_lr is not None and self.lr_decay_style == "constant":
            raise ValueError(
                f"min_lr = {self.min_lr} has no effect with lr_decay_style = constant; "
                "set that to another style, or min_lr to null"
            )
        if self.lowest_lr > self.learning_rate:
            raise ValueError(
                f"min_lr = {self.min_lr} is above learning_rate = {self.learning_rate}; "
                f"allowed: 0 to {self.learning_rate}"
            )
        return self

    @model_validator(mode="after")
    def _has_room_for_wsd(self) -> OptimConfig:
        if self.lr_decay_style != "WSD":
            for name in ("lr_wsd_decay_ratio", "lr_wsd_decay_style"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name} = {value} has no effect with lr_decay_style = "
                        f"{self.lr_decay_style}; set that to WSD, or {name} to null"
                    )
        elif self.warmup_ratio + self.wsd_decay_ratio > 1:
            raise ValueError(
                f"warmup_ratio = {self.warmup_ratio} and lr_wsd_decay_ratio = "
                f"{self.wsd_decay_ratio} are more than the whole schedule; allowed: at most 1 "
                "together"
            )
        return self
