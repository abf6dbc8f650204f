"""Every setting, its type, default, unit and meaning.

Names follow the reference system (TorchSpec) where it has the setting.  Its configurations
need editing all the same: keys that we do not have are errors.  All models are frozen and
strict: an unknown key or a value of another type is an error.

A *device slot* is one GPU where there are GPUs and one process otherwise; the
``num_gpus`` settings count device slots.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from torchspec_hpc.config.logging_schema import LoggingConfig
from torchspec_hpc.config.objective_schema import ObjectiveConfig
from torchspec_hpc.config.optim_schema import OptimConfig
from torchspec_hpc.config.slurm_schema import SlurmConfig
from torchspec_hpc.config.types import Bytes, Ints, ModelRef, PathStr, Section

GiB = 1024**3
MiB = 1024**2


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
    embedding_key: str = Field("model.embed_tokens.weight", description="Its embedding tensor.")
    lm_head_key: str = Field("lm_head.weight", description="Its output head tensor.")
    norm_key: str = Field("model.norm.weight", description="Its last norm's tensor.")
    trust_remote_code: bool = Field(False, description="Run Python code shipped with the target.")


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


class VllmConfig(Section):
    """What is handed to vLLM."""

    tp_size: int = Field(1, ge=1, description="Equals inference_num_gpus_per_engine.")
    mem_fraction_static: float | None = Field(
        None, gt=0, le=1, description="Share of GPU memory for vLLM; null: its default."
    )
    enforce_eager: bool | None = Field(None, description="No CUDA graphs; null: only on CPU.")
    kv_cache_bytes: Bytes | None = Field(
        None, description="Bytes of KV cache; null: 1 GiB on CPU, else from mem_fraction_static."
    )
    extra_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of vllm.LLM; {}: none."
    )


class InferenceConfig(Section):
    """The engines that turn token ids into hidden states."""

    engine: Literal["vllm", "hf", "sglang", "tokenspeed"] = Field(
        "vllm", description="vllm or hf (Transformers); the others have no implementation yet."
    )
    aux_hidden_states_layers: Ints | None = Field(
        None, description="Residual stream after l layers; null: (2, L//2, L-3)."
    )
    inference_num_gpus: int = Field(1, ge=1, description="Device slots of all engines together.")
    inference_num_gpus_per_engine: int = Field(1, ge=1, description="Device slots of one engine.")
    inference_num_gpus_per_node: int = Field(1, ge=1, description="Device slots on one node.")
    inference_batch_size: int = Field(8, ge=1, description="Prompts in one engine batch.")
    max_num_batched_tokens: int | None = Field(
        None, ge=64, description="Tokens of one forward pass; null: the engine's default."
    )
    batch_invariant: bool = Field(
        False, description="Rows must not depend on their batch: slower, bit-reproducible."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the target and its states; auto: the target's, float32 on CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads an engine; null: its own.")
    vllm: VllmConfig = VllmConfig()

    @property
    def num_engines(self) -> int:
        """Engines of the whole inference group."""
        return self.inference_num_gpus // self.inference_num_gpus_per_engine

    @property
    def num_nodes(self) -> int:
        """Nodes of the whole inference group."""
        return -(-self.inference_num_gpus // self.inference_num_gpus_per_node)

    @property
    def num_gpus_per_node(self) -> int:
        """Device slots on each of these nodes."""
        return min(self.inference_num_gpus, self.inference_num_gpus_per_node)

    @property
    def engines_per_node(self) -> int:
        """Engines that start on each node; the last node may have fewer."""
        return self.num_gpus_per_node // self.inference_num_gpus_per_engine

    @model_validator(mode="after")
    def _divides(self) -> InferenceConfig:
        per_engine, per_node = self.inference_num_gpus_per_engine, self.inference_num_gpus_per_node
        if self.inference_num_gpus % per_engine:
            raise ValueError(
                f"inference_num_gpus = {self.inference_num_gpus} is no multiple of "
                f"inference_num_gpus_per_engine = {per_engine}"
            )
        if per_engine > per_node:
            raise ValueError(
                f"inference_num_gpus_per_engine = {per_engine} is more than "
                f"inference_num_gpus_per_node = {per_node}; allowed: engines that fit on one node"
            )
        if self.num_gpus_per_node % per_engine:
            raise ValueError(
                f"inference_num_gpus_per_node = {per_node} is no multiple of "
                f"inference_num_gpus_per_engine = {per_engine}"
            )
        return self

    @model_validator(mode="after")
    def _uses_each_device(self) -> InferenceConfig:
        per_engine = self.inference_num_gpus_per_engine
        if self.engine == "vllm" and self.vllm.tp_size != per_engine:
            raise ValueError(
                f"vllm.tp_size = {self.vllm.tp_size} and inference_num_gpus_per_engine = "
                f"{per_engine} differ; allowed: the same number for both"
            )
        if self.engine == "hf" and per_engine != 1:
            raise ValueError(
                f"inference_num_gpus_per_engine = {per_engine} with engine hf, which has no "
                "tensor parallelism; allowed: 1"
            )
        return self


class MooncakeConfig(Section):
    """The store that carries hidden states from engines to trainers."""

    protocol: Literal["tcp", "rdma"] = Field("tcp", description="Of transfers between nodes.")
    device_name: str = Field(
        "", description="RDMA devices, comma-separated, e.g. mlx5_0; empty: what Mooncake finds."
    )
    global_segment_size: Bytes = Field(4 * GiB, description="Bytes per trainer rank.")
    local_buffer_size: Bytes = Field(512 * MiB, description="Bytes per client.")
    kv_lease_ttl_s: float = Field(
        5.0, gt=0, description="Seconds that a read may take: the object stays in place that long."
    )
    master_port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    put_deadline_s: float = Field(300.0, gt=0, description="Longest wait for space, seconds.")


class ControlConfig(Section):
    """Deadlines of the control plane, in seconds. Every wait has one."""

    host: str | None = Field(
        None, description="Address that services bind to and are found at; null: the node's own."
    )
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    service_ready_s: float = Field(300.0, gt=0, description="Mooncake master and control store.")
    engine_ready_s: float = Field(1800.0, gt=0, description="First engine up, weights loaded.")
    request_deadline_s: float = Field(600.0, gt=0, description="Then a request is sent again.")
    request_max_tries: int = Field(5, ge=1, description="Tries of one request; 1: no second one.")
    stop_grace_s: float | None = Field(
        None,
        gt=0,
        description="From stop asked to trainers gone; null: slurm.signal_before_s - 60, at least"
        " 30, in a Slurm job; 120 on this machine.",
    )
    heartbeat_s: float = Field(5.0, gt=0, description="Between an engine's signs of life.")


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
