"""Settings of what a draft is trained to do, and of how that is computed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from torchspec_hpc.config.types import Section

#: Of ``torchspec_hpc.drafts.losses``, where the formulas are.
LossName = Literal[
    "forward_kl", "reverse_kl", "cross_entropy", "total_variation", "lk_alpha", "lk_lambda"
]

#: Of ``lk_eta``; the best value of the paper that ``torchspec_hpc.drafts.losses`` names.
_LK_ETA = 3.0


AttentionBackend = Literal["auto", "sdpa", "flash", "flash_attn", "flex_attention", "plain"]


class ObjectiveConfig(Section):
    """Training-time test and loss."""

    ttt_length: int = Field(7, ge=1, description="Steps of the training-time test, K.")
    ttt_loss_decay: float = Field(0.8, gt=0, le=1, description="Weight of TTT step i is decay^i.")
    loss_type: LossName | dict[LossName, Annotated[float, Field(gt=0)]] = Field(
        "forward_kl", description="Name of a loss, or names with weights: their weighted sum."
    )
    lk_eta: float | None = Field(
        None,
        ge=0,
        description="lk_lambda's weight of KL is exp(-lk_eta * acceptance rate); null: 3.",
    )
    freeze_lm_head: bool = Field(False, description="Leave the draft's head as the target has it.")
    attention_backend: AttentionBackend = Field(
        "auto",
        description="auto: sdpa on CPUs; flash (flash attention 2 of PyTorch) on GPUs, with float32"
        " flex_attention; flash_attn: the package; plain is the slow reference.",
    )
    torch_compile: bool | Literal["auto"] = Field(
        "auto", description="Fuse elementwise work; auto: on GPUs. The first step takes longer."
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only the input of each TTT step: less memory, a third slower."
    )
    loss_chunk_mib: int | None = Field(
        None, ge=1, description="MiB of logits at a time; null: 16 on CPUs, 1024 on GPUs."
    )

    @field_validator("loss_type")
    @classmethod
    def _names_a_loss(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if not value:
            raise ValueError("loss_type = {} is no loss; allowed: a name, or names with weights")
        return value

    @property
    def kl_decay(self) -> float:
        """How fast lk_lambda turns away from KL."""
        return _LK_ETA if self.lk_eta is None else self.lk_eta

    @model_validator(mode="after")
    def _has_a_loss_for_eta(self) -> ObjectiveConfig:
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        if self.lk_eta is not None and "lk_lambda" not in names:
            raise ValueError(
                f"lk_eta = {self.lk_eta} has no effect with loss_type = {', '.join(names)}; "
                "add lk_lambda to that, or set lk_eta to null"
            )
        return self
