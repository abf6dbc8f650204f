"""Settings of the data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from torchspec_hpc.config.types import PathStr, Section


class DatasetConfig(Section):
    """Conversations, and how they become tokens and a loss mask."""

    train_data_path: PathStr = Field(description="Conversations to train on, JSONL or Parquet.")
    eval_data_path: PathStr | None = Field(None, description="Held-out conversations; null: none.")
    eval_interval: int = Field(0, ge=0, description="Steps between evaluations; 0: never.")
    eval_max_tokens: int = Field(
        100_000, ge=1, description="Held-out samples beyond it are not used: states stay in memory."
    )
    chat_template: PathStr | None = Field(None, description="Jinja file; null: the model's own.")
    prompt_key: str | None = Field(
        None, description="Column of the turns; null: conversations or messages, what is there."
    )
    last_turn_loss_only: bool | Literal["auto"] = Field(
        False, description="auto: true if the chat template shows earlier answers changed."
    )
    min_loss_tokens: int = Field(1, ge=1, description="Rows with fewer supervised tokens are out.")
    max_rejected_share: float = Field(
        0.1, ge=0, le=1, description="More bad rows than this share end the run; 1: never."
    )
    shuffle_dataset: bool = Field(True, description="A new permutation each epoch.")

    @model_validator(mode="after")
    def _has_what_it_evaluates(self) -> DatasetConfig:
        if self.eval_interval and self.eval_data_path is None:
            raise ValueError(
                f"eval_interval = {self.eval_interval} needs eval_data_path; "
                "set it, or eval_interval to 0"
            )
        return self
