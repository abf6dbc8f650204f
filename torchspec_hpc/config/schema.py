"""Every setting, its type, default, unit and meaning.

Names follow the reference system (TorchSpec) where it has the setting, so that
its configurations load here.  All models are frozen and strict: an unknown key
or a value of another type is an error.

A *device slot* is one GPU where there are GPUs and one process otherwise; the
``num_gpus`` settings count device slots.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from torchspec_hpc.config.types import Bytes, Ints, ModelRef, PathStr, Strs

GiB = 1024**3
MiB = 1024**2


class Section(BaseModel):
    """Base of all sections: frozen, strict, unknown keys rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class ModelConfig(Section):
    """The target model and the draft that is trained for it."""

    target_model_path: ModelRef = Field(description="Directory or hub id of the target model.")
    draft_algorithm: Literal["eagle3"] = "eagle3"
    draft_model_config: PathStr | None = Field(
        None, description="JSON file of the draft's shape; derived from the target when null."
    )
    draft_vocab_size: int | None = Field(
        None, gt=0, description="Rows of the draft head; null keeps the target's vocabulary."
    )
    embedding_key: str = "model.embed_tokens.weight"
    lm_head_key: str = "lm_head.weight"
    norm_key: str = "model.norm.weight"
    trust_remote_code: bool = False


class DatasetConfig(Section):
    """Conversations, and how they become tokens and a loss mask."""

    train_data_path: PathStr
    eval_data_path: PathStr | None = None
    eval_interval: int = Field(0, ge=0, description="Steps between evaluations; 0: never.")
    chat_template: str | None = Field(
        None, description="Path of a Jinja chat template; null: the tokenizer's own."
    )
    prompt_key: str | None = Field(
        None, description="Column of the turns; null: conversations or messages, what is there."
    )
    last_turn_loss_only: bool | Literal["auto"] = Field(
        False, description="auto: true if the chat template shows earlier answers changed."
    )
    min_loss_tokens: int = Field(1, ge=1, description="Rows with fewer supervised tokens are out.")
    max_rejected_share: float = Field(
        0.1, ge=0, le=1, description="More bad rows than this share end the run."
    )
    shuffle_dataset: bool = True


class TrainingConfig(Section):
    """The trainers."""

    training_num_nodes: int = Field(1, ge=1)
    training_num_gpus_per_node: int = Field(1, ge=1, description="Trainer processes per node.")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compute_dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Of matrix products; master weights are always float32."
    )
    seed: int = Field(0, ge=0)
    num_epochs: int = Field(1, ge=1)
    num_train_steps: int | None = Field(
        None, ge=1, description="Optimizer steps; null: num_epochs over the data."
    )
    micro_batch_size: int = Field(1, ge=1, description="Samples per rank and micro-batch.")
    draft_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per step.")
    max_seq_length: int = Field(2048, ge=4, description="Tokens; longer samples are truncated.")
    ttt_length: int = Field(7, ge=1, description="Steps of the training-time test, K.")
    ttt_loss_decay: float = Field(0.8, gt=0, le=1, description="Weight of TTT step i is decay^i.")
    attention_backend: Literal["auto", "sdpa"] = "auto"
    learning_rate: float = Field(1e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    lr_total_steps: int | None = Field(None, ge=1, description="null: the length of the run.")
    warmup_ratio: float = Field(0.015, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_betas: Annotated[tuple[float, float], BeforeValidator(lambda v: tuple(v))] = (0.9, 0.95)
    max_grad_norm: float = Field(0.5, gt=0)
    fsdp_strategy: Literal["full_shard", "replicate"] = "full_shard"
    fsdp_reduce_dtype: Literal["bfloat16", "float32"] = "float32"
    gradient_checkpointing: bool = False
    save_interval: int = Field(500, ge=0, description="Steps between checkpoints; 0: at the end.")
    save_per_epoch: bool = False
    max_checkpoints: int = Field(3, ge=1)
    load_path: PathStr | None = Field(None, description="Checkpoint to start from.")
    continual_training: bool = Field(False, description="Take only the weights of load_path.")
    prefetch_depth: int = Field(4, ge=1, description="Micro-batches asked for ahead of the step.")
    distributed_timeout_minutes: int = Field(30, ge=1)
    num_threads: int | None = Field(None, ge=1, description="CPU threads a process; null: torch's.")


class VllmConfig(Section):
    """What is handed to vLLM."""

    tp_size: int = Field(1, ge=1)
    mem_fraction_static: float | None = Field(None, gt=0, le=1)
    max_num_batched_tokens: int | None = Field(None, ge=64)
    enforce_eager: bool | None = Field(None, description="null: true on CPU, false on GPU.")
    kv_cache_bytes: Bytes | None = Field(
        None, description="KV cache of a CPU engine; null: one gibibyte."
    )
    extra_args: dict[str, Any] = Field(default_factory=dict)


class InferenceConfig(Section):
    """The engines that turn token ids into hidden states."""

    engine: Literal["vllm", "hf", "sglang", "tokenspeed"] = "vllm"
    aux_hidden_states_layers: Ints | None = Field(
        None, description="Residual stream after l layers; null: (2, L//2, L-3)."
    )
    inference_num_gpus: int = Field(1, ge=1)
    inference_num_gpus_per_engine: int = Field(1, ge=1)
    inference_num_gpus_per_node: int = Field(1, ge=1)
    inference_batch_size: int = Field(8, ge=1, description="Prompts in one engine batch.")
    batch_invariant: bool = Field(
        False, description="Rows must not depend on their batch: slower, bit-reproducible."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = Field(None, ge=1, description="CPU threads of an engine.")
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
        return max(1, self.num_gpus_per_node // self.inference_num_gpus_per_engine)

    @model_validator(mode="after")
    def _divides(self) -> InferenceConfig:
        if self.inference_num_gpus % self.inference_num_gpus_per_engine:
            raise ValueError(
                f"inference_num_gpus = {self.inference_num_gpus} is no multiple of "
                f"inference_num_gpus_per_engine = {self.inference_num_gpus_per_engine}"
            )
        return self


class MooncakeConfig(Section):
    """The store that carries hidden states from engines to trainers."""

    protocol: Literal["tcp", "rdma"] = "tcp"
    device_name: str = ""
    global_segment_size: Bytes = Field(4 * GiB, description="Per trainer rank.")
    local_buffer_size: Bytes = Field(512 * MiB, description="Per client.")
    enable_gpu_direct: bool = False
    kv_lease_ttl_s: float = Field(5.0, gt=0)
    master_port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    put_deadline_s: float = Field(300.0, gt=0, description="Longest wait for space.")


class ControlConfig(Section):
    """Deadlines of the control plane, in seconds. Every wait has one."""

    host: str | None = Field(None, description="Interface to bind; null: the node's own address.")
    port: int = Field(0, ge=0, le=65535, description="0: any free port.")
    service_ready_s: float = Field(300.0, gt=0, description="Mooncake master and control store.")
    engine_ready_s: float = Field(1800.0, gt=0, description="First engine up, weights loaded.")
    request_deadline_s: float = Field(600.0, gt=0, description="Then a request is sent again.")
    request_max_tries: int = Field(5, ge=1)
    stop_grace_s: float = Field(120.0, gt=0, description="From stop asked to trainers gone.")
    heartbeat_s: float = Field(5.0, gt=0)


class LoggingConfig(Section):
    """What is reported, and where to."""

    report_to: Strs = ("tensorboard",)
    log_interval: int = Field(1, ge=1, description="Steps between lines and points.")

    @model_validator(mode="after")
    def _known(self) -> LoggingConfig:
        allowed = {"tensorboard", "none"}
        if unknown := set(self.report_to) - allowed:
            raise ValueError(f"report_to has {sorted(unknown)}; allowed: {sorted(allowed)}")
        return self


class SlurmGroupConfig(Section):
    """Resources of one component of the het job, per node."""

    partition: str | None = None
    constraint: str | None = None
    cpus_per_task: int = Field(8, ge=1)
    mem: str | None = Field(None, description="Memory per node as Slurm spells it, e.g. 240G.")
    gpus: Literal["gres", "gpus-per-node", "none"] = Field(
        "gres", description="How GPUs are asked for; none: a CPU partition."
    )
    gpu_type: str | None = Field(None, description="As in --gres=gpu:TYPE:N.")
    extra: Strs = Field((), description="Further sbatch options, without the leading #SBATCH.")


class SlurmConfig(Section):
    """The Slurm job. Only used when ``cluster`` is ``slurm``."""

    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    time: str = Field("04:00:00", description="Wall time of one attempt.")
    signal_before_s: int = Field(600, ge=10, description="Warning before the time limit.")
    requeue: bool = True
    max_attempts: int = Field(100, ge=1, description="Attempts of the whole run, crashes too.")
    network_interface: str | None = Field(None, description="For GLOO_ and NCCL_SOCKET_IFNAME.")
    setup: Strs = Field((), description="Shell lines before anything else: module load ...")
    python: str | None = Field(None, description="Interpreter on the nodes; null: this one.")
    inference: SlurmGroupConfig = SlurmGroupConfig()
    training: SlurmGroupConfig = SlurmGroupConfig()


class Config(Section):
    """One run."""

    cluster: Literal["local", "slurm"] = "local"
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
