"""Settings of what is reported, and where to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from torchspec_hpc.config.types import Names, Section


class LoggingConfig(Section):
    """What is reported, and where to."""

    report_to: Names = Field(
        ("tensorboard",),
        description="tensorboard, wandb, or both in a list; none: the run's JSONL only.",
    )
    log_interval: int = Field(1, ge=1, description="Steps between lines and points.")
    wandb_project: str | None = Field(None, description="W&B project; null: torchspec_hpc.")
    wandb_entity: str | None = Field(
        None, description="W&B user or team; null: the default one of the key's owner."
    )
    wandb_name: str | None = Field(None, description="W&B run's name; null: the name of the run.")
    wandb_group: str | None = Field(None, description="W&B group; null: the name of the run.")
    wandb_mode: Literal["online", "offline"] | None = Field(
        None,
        description="offline: into the run directory, to upload with `wandb sync`; null: online.",
    )

    @model_validator(mode="after")
    def _known(self) -> LoggingConfig:
        allowed = {"tensorboard", "wandb", "none"}
        if unknown := set(self.report_to) - allowed:
            raise ValueError(f"report_to has {sorted(unknown)}; allowed: {sorted(allowed)}")
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(
                f"report_to = {list(self.report_to)}: none excludes the others; "
                "leave it out, or the others"
            )
        return self

    @model_validator(mode="after")
    def _has_wandb_for_its_keys(self) -> LoggingConfig:
        given = self.model_dump(exclude_none=True)
        for name in type(self).model_fields:
            if name.startswith("wandb_") and name in given and "wandb" not in self.report_to:
                raise ValueError(
                    f"{name} = {given[name]} has no effect with report_to = "
                    f"{list(self.report_to)}; add wandb to that, or set {name} to null"
                )
        return self
