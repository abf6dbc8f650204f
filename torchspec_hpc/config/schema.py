"""Every setting, its type, default, unit and meaning.

Names follow the reference system (TorchSpec) where it has the setting.  Its configurations
need editing all the same: keys that we do not have are errors.  All models are frozen and
strict: an unknown key or a value of another type is an error.

A *device slot* is one GPU where there are GPUs and one process otherwise; the
``num_gpus`` settings count device slots.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from torchspec_hpc.config.dataset_schema import DatasetConfig
from torchspec_hpc.config.inference_schema import InferenceConfig
from torchspec_hpc.config.logging_schema import LoggingConfig
from torchspec_hpc.config.objective_schema import ObjectiveConfig
from torchspec_hpc.config.optim_schema import OptimConfig
from torchspec_hpc.config.slurm_schema import SlurmConfig
from torchspec_hpc.config.transfer_schema import ControlConfig, MooncakeConfig
from torchspec_hpc.config.types import ModelRef, PathStr, Section


class ModelConfig(Section):
    """The target model and the draft that is trained for it."""

    target_model_path: ModelRef = Field(description="Directory or hub id of the target model.")
    draft_algorithm: Literal["eagle3"] = Field("eagle3", description="Kind of draft.")
    draft_model_config: PathStr | None = Field(
        None, description="JSON file of the draft's shape; null: derived from the target."
    )
    draft_vocab_size: int | None = Field(
        None, gt=0, description="Rows of the draft head; null: the target's whole vocabulary."
    )
    initial_draft: ModelRef | None = Field(
        None,
        description="Published EAGLE-3 draft, directory or hub id, whose shape and weights training"
        " begins with; null: new weights.",
    )
    embedding_key: str = Field("model.embed_tokens.weight", description="Its embedding tensor.")
    lm_head_key: str = Field("lm_head.weight", description="Its output head tensor.")
    norm_key: str = Field("model.norm.weight", description="Its last norm's tensor.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the target.")

    @model_validator(mode="after")
    def _has_one_shape(self) -> ModelConfig:
        if self.initial_draft is not None and self.draft_model_config is not None:
            raise ValueError(
                f"initial_draft = {self.initial_draft} and draft_model_config = "
                f"{self.draft_model_config} both give the draft's shape; allowed: one of them"
            )
        return self


class TrainingConfig(OptimConfig, ObjectiveConfig):
    """The trainers."""

    training_num_nodes: int = Field(1, ge=1, description="Nodes of trainers.")
    training_num_gpus_per_node: int = Field(1, ge=1, description="Trainer processes per node.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is.")
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of matrix products; master weights are always float32."
    )
    seed: int = Field(0, ge=0, description="Of the draft's weights and the order of the data.")
    num_epochs: int = Field(1, ge=1, description="Passes over the data.")
    num_train_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; null: num_epochs over the data."
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=4,
        description="Most tokens of a rank's micro-batch, which samples fill one after the other;"
        " null: max_seq_length, or what micro_batch_size says.",
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Samples of a micro-batch instead; null: micro_batch_tokens counts."
    )
    draft_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per rank and step.")
    max_seq_length: int = Field(
        2048,
        ge=4,
        description="Tokens; longer samples keep their beginning and are counted as truncated.",
    )
    fsdp_strategy: Literal["full_shard", "replicate"] = Field(
        "full_shard", description="Weights and optimizer state cut over ranks, or whole on each."
    )
    fsdp_reduce_dtype: Literal["bfloat16", "float32"] = Field(
        "float32", description="Of gradients while ranks add them up."
    )
    save_interval: int = Field(500, ge=0, description="Steps between checkpoints; 0: at the end.")
    save_per_epoch: bool = Field(False, description="A checkpoint after each epoch, too.")
    max_checkpoints: int = Field(
        3, ge=1, description="Checkpoints that are kept: the newest; the best one stays as well."
    )
    async_checkpoint: bool = Field(True, description="Train on while a checkpoint is written.")
    load_path: PathStr | None = Field(None, description="Checkpoint or run to go on; null: none.")
    continual_training: bool = Field(False, description="Take only the weights of load_path.")
    prefetch_depth: int = Field(4, ge=1, description="Micro-batches asked for ahead of the step.")
    distributed_timeout_minutes: int = Field(30, ge=1, description="Of a collective, minutes.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads a process; null: torch's.")
    peak_tflops: float | None = Field(
        None, gt=0, description="Dense peak of one device, TFLOP/s, for MFU; null: by its name."
    )

    @property
    def pack_tokens(self) -> int | None:
        """Most tokens of a micro-batch; None: ``micro_batch_size`` counts its samples."""
        if self.micro_batch_size is not None:
            return None
        return self.micro_batch_tokens or self.max_seq_length

    @model_validator(mode="after")
    def _fits(self) -> TrainingConfig:
        if self.micro_batch_tokens is not None and self.micro_batch_size is not None:
            raise ValueError(
                f"micro_batch_tokens = {self.micro_batch_tokens} and micro_batch_size = "
                f"{self.micro_batch_size} are both given; allowed: one of them"
            )
        if self.continual_training and self.load_path is None:
            raise ValueError(
                "continual_training = true needs load_path; "
                "set it to a checkpoint, or continual_training to false"
            )
        return self


class Config(Section):
    """One run."""

    cluster: Literal["local", "slurm"] = Field("local", description="This machine, or a Slurm job.")
    run_name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="null: file name and time."
    )
    output_dir: PathStr = Field(description="Runs are written to output_dir/run_name.")
    cache_dir: PathStr | None = Field(None, description="null: output_dir/cache.")
    model: ModelConfig
    dataset: DatasetConfig
    training: TrainingConfig = TrainingConfig()
    inference: InferenceConfig = InferenceConfig()
    mooncake: MooncakeConfig = MooncakeConfig()
    control: ControlConfig = ControlConfig()
    logging: LoggingConfig = LoggingConfig()
    slurm: SlurmConfig = SlurmConfig()

    @model_validator(mode="after")
    def _has_one_beginning(self) -> Config:
        if self.model.initial_draft is not None and self.training.load_path is not None:
            raise ValueError(
                f"model.initial_draft = {self.model.initial_draft} and training.load_path = "
                f"{self.training.load_path} both give the first weights; allowed: one of them"
            )
        return self
