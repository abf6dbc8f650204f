"""What a run will take, before it is submitted: memory, disk, hours.  By formula, not measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchspec_hpc.config.schema import Config
from torchspec_hpc.config.slurm_schema import time_limit_s
from torchspec_hpc.errors import ConfigError
from torchspec_hpc.slurm.shape import Component, components, inference_group, total_gpus
from torchspec_hpc.target.spec import TargetSpec

#: Bytes of one number.
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Of a trained parameter: master, gradient and two moments, all float32.
_STATE_BYTES, _SAVED_BYTES = 16, 12


@dataclass(frozen=True)
class ModelEstimate:
    """Sizes that follow from the target's shape.

    Attributes:
        target_bytes: Its weights; None where they are not on this machine.
        kv_bytes_per_token: Of the engine's KV cache.
        states_bytes_per_token: Hidden states that travel.
        draft_parameters: That are trained; the draft reads the target's embedding.
        embedding_bytes: Of the target's embedding, head and norm, on every trainer.
    """

    target_bytes: int | None
    kv_bytes_per_token: int
    states_bytes_per_token: int
    draft_parameters: int
    embedding_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run asks for and takes.

    Attributes:
        components: One for each part of the job.
        engines: Number of engines, devices and nodes of each.
        memory: Bytes, by what holds them.
        checkpoint_bytes: Disk of one checkpoint.
        disk_bytes: Disk of all checkpoints that are kept.
        num_gpus: GPUs of the job.
        node_hours: Of one attempt that takes all of its time.
        gpu_hours: Likewise.
        time_s: Longest time of an attempt.
        warnings: What looks wrong, or is not known.
    """

    components: list[Component]
    engines: dict[str, int]
    memory: dict[str, int]
    checkpoint_bytes: int | None
    disk_bytes: int | None
    num_gpus: int
    node_hours: float
    gpu_hours: float
    time_s: float
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data, without the details of the components' options."""
        known = asdict(self)
        known["components"] = [
            {
                "groups": c.name,
                "partition": c.options.partition,
                "nodes": c.num_nodes,
                "tasks_per_node": c.tasks_per_node,
                "cpus_per_task": c.cpus_per_task,
                "gpus_per_node": c.gpus_per_node if c.options.gpus != "none" else 0,
                "mem": c.options.mem,
            }
            for c in self.components
        ]
        known["time_s"] = None if math.isinf(self.time_s) else self.time_s
        return known


def make_plan(config: Config) -> Plan:
    """Plans a run.

    Raises:
        ConfigError: The groups do not fit on one node although they are to share it.
    """
    parts, inference = components(config), inference_group(config)
    time_s = time_limit_s(config.slurm.time)
    hours = time_s / 3600 if math.isfinite(time_s) else 0.0
    warnings = _warnings(config)
    try:
        model = estimate_model(config)
    except ConfigError as error:
        model = None
        warnings.append(f"memory and disk are not known: {error.what}")
    checkpoint = None if model is None else model.draft_parameters * _SAVED_BYTES
    num_checkpoints = config.training.max_checkpoints + 1  # while the next one is written
    return Plan(
        components=parts,
        engines={
            "num": inference.num_tasks,
            "gpus_each": config.inference.inference_num_gpus_per_engine,
            "per_node": inference.tasks_per_node,
            "nodes": inference.num_nodes,
        },
        memory={} if model is None else _memory(config, model, warnings),
        checkpoint_bytes=checkpoint,
        disk_bytes=None if checkpoint is None else checkpoint * num_checkpoints,
        num_gpus=total_gpus(config),
        node_hours=hours * sum(part.num_nodes for part in parts),
        gpu_hours=hours * total_gpus(config),
        time_s=time_s,
        warnings=warnings,
    )


def estimate_model(config: Config) -> ModelEstimate:
    """Sizes by the target's ``config.json``.

    Raises:
        ConfigError: It is not on this machine.
    """
    folder = _local_folder(config.model.target_model_path)
    spec = TargetSpec.from_path(str(folder))
    layers = spec.aux_layers(config.inference.aux_hidden_states_layers)
    h, v = spec.hidden_size, spec.vocab_size
    dtype = spec.dtype if config.inference.dtype == "auto" else config.inference.dtype
    size = _DTYPE_BYTES.get(dtype, 2)
    kv = 2 * spec.num_key_value_heads * spec.head_dim
    attention = 2 * h * (spec.num_attention_heads * spec.head_dim + kv)
    attention += spec.num_attention_heads * spec.head_dim * h
    head = (config.model.draft_vocab_size or v) * h
    return ModelEstimate(
        target_bytes=sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None,
        kv_bytes_per_token=spec.num_layers * kv * size,
        states_bytes_per_token=(len(layers) + 1) * h * size,
        draft_parameters=len(layers) * h * h + attention + 3 * h * spec.intermediate_size + head,
        embedding_bytes=2 * v * h * _DTYPE_BYTES[config.training.compute_dtype],
    )


def _local_folder(path: str) -> Path:
    """A model's directory; of a hub id, the one in the cache, and nothing is downloaded.

    Raises:
        ConfigError: It is not on this machine.
    """
    if Path(path).is_absolute():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(path, "config.json")
    if not isinstance(file, str):
        raise ConfigError(f"{path} is not in this machine's cache of the Hugging Face hub")
    return Path(file).parent


def _memory(config: Config, model: ModelEstimate, warnings: list[str]) -> dict[str, int]:
    training, inference = config.training, config.inference
    num_trainers = training.training_num_nodes * training.training_num_gpus_per_node
    shards = num_trainers if training.fsdp_strategy == "full_shard" else 1
    window = training.prefetch_depth * (training.pack_tokens or training.max_seq_length)
    batch = inference.max_num_batched_tokens or 8192
    memory = {
        "kv cache of one engine's batch": model.kv_bytes_per_token * batch,
        "hidden states asked for by one trainer": model.states_bytes_per_token * window,
        "store segment of one trainer": config.mooncake.global_segment_size,
        "draft, gradients and moments of one trainer": model.draft_parameters
        * _STATE_BYTES
        // shards,
        "target's embedding and head of one trainer": model.embedding_bytes,
    }
    if model.target_bytes is None:
        warnings.append("the target's weights are not on this machine: their size is not known")
    else:
        share = model.target_bytes // inference.inference_num_gpus_per_engine
        memory = {"target's weights of one GPU": share, **memory}
    wanted = memory["hidden states asked for by one trainer"]
    if wanted > config.mooncake.global_segment_size:
        warnings.append(
            f"a trainer asks for {wanted / 2**30:.1f} GiB of hidden states ahead and its segment "
            "holds less (mooncake.global_segment_size): engines will wait for space"
        )
    return memory


def _warnings(config: Config) -> list[str]:
    slurm = config.slurm
    found = []
    if config.cluster != "slurm":
        return ["cluster is local: the numbers are those that cluster=slurm would ask for"]
    if slurm.account is None:
        found.append("slurm.account is not set: your default account pays")
    for name, group in (("inference", slurm.inference), ("training", slurm.training)):
        if group.mem is None:
            found.append(f"slurm.{name}.mem is not set: the partition's default may be small")
    if slurm.resume == "none":
        found.append("slurm.resume is none: the run ends with its first attempt")
    if config.training.save_interval == 0:
        found.append("training.save_interval is 0: a node failure loses all steps of the attempt")
    if "SCRATCH" not in config.output_dir and Path(config.output_dir).is_relative_to(Path.home()):
        found.append(f"output_dir is in your home directory ({config.output_dir}): mind its quota")
    return found
