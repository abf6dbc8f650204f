"""Settings of the data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from torchspec_hpc.config.types import PathStr, Section, resolve_path

#: Model families whose answers can be found by their marks (data/parsers.py).
ParserName = Literal[
    "chatml",
    "llama3",
    "llama4",
    "phi3",
    "phi4",
    "harmony",
    "deepseek",
    "kimi",
    "ling",
    "minimax",
]
#: A data set of the Hugging Face hub: ``hf://organisation/name[@revision][:split]``.
HUB = "hf://"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:\w+)?")
_DATA_FILE = re.compile(r"\.(jsonl?|parquet|arrow)$")


def _resolve_data(value: Any, info: ValidationInfo) -> Any:
    """A hub id if it is one and no file or directory has this name; otherwise a path."""
    if not isinstance(value, str) or value.startswith(HUB):
        return value
    path = resolve_path(value, info)
    is_hub_id = _HUB_ID.fullmatch(value) and not _DATA_FILE.search(value)
    return HUB + value if is_hub_id and not Path(path).exists() else path


#: A data file, a directory of them, or a data set of the hub.
DataRef = Annotated[str, BeforeValidator(_resolve_data)]


class DatasetConfig(Section):
    """Conversations, and how they become tokens and a loss mask."""

    train_data_path: DataRef = Field(
        description="Rows to train on: .jsonl, .json, .parquet, .arrow, a directory, or hub id."
    )
    eval_data_path: DataRef | None = Field(None, description="Held-out rows; null: none.")
    eval_interval: int = Field(0, ge=0, description="Steps between evaluations; 0: never.")
    eval_max_tokens: int = Field(
        100_000, ge=1, description="Held-out samples beyond it are not used: states stay in memory."
    )
    chat_template: PathStr | None = Field(None, description="Jinja file; null: the model's own.")
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="Variables of the chat template, e.g. {enable_thinking: false}."
    )
    answer_parser: ParserName | None = Field(
        None, description="Find answers by a family's marks; null: by the chat template, checked."
    )
    prompt_key: str | None = Field(
        None, description="Column of the turns; null: conversations or messages, what is there."
    )
    last_turn_loss_only: bool | Literal["auto"] = Field(
        False, description="auto: true if the chat template shows earlier answers changed."
    )
    min_loss_tokens: int = Field(1, ge=1, description="Rows with fewer supervised tokens are out.")
    unique_ids: bool = Field(True, description="A row whose id was there before is a bad row.")
    max_rejected_share: float = Field(
        0.01, ge=0, le=1, description="More bad rows than this share end the run; 1: never."
    )
    num_prepare_workers: int | None = Field(
        None, ge=1, description="Processes that tokenize; null: one for each core of the process."
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
