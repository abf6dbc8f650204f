"""Settings of the inference group."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from torchspec_hpc.config.types import Bytes, Ints, PathStr, Section


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


class GenerationConfig(Section):
    """How the target answers where ``respond`` is ``target``."""

    max_tokens: int = Field(512, ge=1, description="Longest answer, end of turn included.")
    temperature: float = Field(1.0, ge=0, description="1: the target's own distribution; 0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of probability to sample from; 1: all")
    seed: int = Field(0, ge=0, description="Of the answers; each sample has its own numbers.")
    stop_token_ids: Ints = Field(
        (), description="Ends of an answer, besides the target's own end-of-turn tokens."
    )


class HfConfig(Section):
    """How Transformers runs the target."""

    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] | None = Field(
        None, description="Of attention; null: Transformers' choice, sdpa for most models."
    )


class SglangConfig(Section):
    """What is handed to SGLang."""

    tp_size: int = Field(1, ge=1, description="Equals inference_num_gpus_per_engine.")
    mem_fraction_static: float | None = Field(
        None, gt=0, le=1, description="Share of GPU memory for SGLang; null: its default."
    )
    extra_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of sglang.Engine; {}: none."
    )


class InferenceConfig(Section):
    """The engines that turn token ids into hidden states."""

    engine: Literal["vllm", "hf", "sglang", "tokenspeed"] = Field(
        "vllm", description="hf is Transformers; tokenspeed cannot work yet."
    )
    aux_hidden_states_layers: Ints | None = Field(
        None, description="Residual stream after l layers; null: (2, L//2, L-3)."
    )
    inference_num_gpus: int = Field(
        1, ge=0, description="Device slots of all engines; 0: none, all states are in cache_dir."
    )
    inference_num_gpus_per_engine: int = Field(1, ge=1, description="Device slots of one engine.")
    inference_num_gpus_per_node: int = Field(1, ge=1, description="Device slots on one node.")
    inference_batch_size: int = Field(8, ge=1, description="Prompts in one engine batch.")
    max_num_batched_tokens: int | None = Field(
        None, ge=64, description="Tokens of one forward pass; null: the engine's default."
    )
    batch_invariant: bool = Field(
        False, description="Rows must not depend on their batch: slower, bit-reproducible."
    )
    respond: Literal["dataset", "target"] = Field(
        "dataset",
        description="dataset: train on its answers; target: the engine writes the last answer of"
        " each conversation itself, and only that is trained on.",
    )
    generation: GenerationConfig = GenerationConfig()
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of the target and its states; auto: the target's, float32 on CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there is.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads an engine; null: its own.")
    cache_dir: PathStr | None = Field(
        None, description="Keeps the states of training samples on disk; null: held-out ones only."
    )
    cache_max_bytes: Bytes | None = Field(
        None, description="Of the states of a run's training samples there; null: all of them."
    )
    vllm: VllmConfig = VllmConfig()
    hf: HfConfig = HfConfig()
    sglang: SglangConfig = SglangConfig()

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
    def nodes_per_engine(self) -> int:
        """Nodes that one engine spans."""
        return -(-self.inference_num_gpus_per_engine // self.inference_num_gpus_per_node)

    @property
    def num_ranks(self) -> int:
        """Processes of the inference group: one for each node of each engine."""
        return self.num_engines * self.nodes_per_engine

    @property
    def ranks_per_node(self) -> int:
        """Of those; the last node may have fewer."""
        return max(1, self.num_gpus_per_node // self.inference_num_gpus_per_engine)

    @model_validator(mode="after")
    def _divides(self) -> InferenceConfig:
        per_engine, per_node = self.inference_num_gpus_per_engine, self.inference_num_gpus_per_node
        if self.inference_num_gpus % per_engine:
            raise ValueError(
                f"inference_num_gpus = {self.inference_num_gpus} is no multiple of "
                f"inference_num_gpus_per_engine = {per_engine}"
            )
        if per_engine > per_node:
            self._check_several_nodes()
        elif self.num_gpus_per_node % per_engine:
            raise ValueError(
                f"inference_num_gpus_per_node = {per_node} is no multiple of "
                f"inference_num_gpus_per_engine = {per_engine}"
            )
        return self

    def _check_several_nodes(self) -> None:
        per_engine, per_node = self.inference_num_gpus_per_engine, self.inference_num_gpus_per_node
        if per_engine % per_node or self.engine != "vllm":
            raise ValueError(
                f"inference_num_gpus_per_engine = {per_engine} is more than "
                f"inference_num_gpus_per_node = {per_node}; allowed: engines that fit on one node, "
                "or, with engine vllm, that use all slots of several"
            )

    @model_validator(mode="after")
    def _can_answer(self) -> InferenceConfig:
        if self.respond == "target" and self.engine != "vllm":
            raise ValueError(
                f"respond = target with engine {self.engine}, which generates nothing; "
                "allowed: engine vllm"
            )
        return self

    @model_validator(mode="after")
    def _has_a_source(self) -> InferenceConfig:
        if self.cache_dir is None and self.inference_num_gpus == 0:
            raise ValueError(
                "inference_num_gpus = 0 without cache_dir: hidden states come from nowhere; "
                "set cache_dir to where a run with engines has kept them"
            )
        if self.cache_dir is None and self.cache_max_bytes is not None:
            raise ValueError("cache_max_bytes bounds what is kept in cache_dir, which is not set")
        if self.cache_dir is not None and self.respond == "target":
            raise ValueError(
                "cache_dir with respond = target, whose answers are not kept; allowed: one of them"
            )
        return self

    @model_validator(mode="after")
    def _uses_each_device(self) -> InferenceConfig:
        per_engine = self.inference_num_gpus_per_engine
        tp_sizes = {"vllm": self.vllm.tp_size, "sglang": self.sglang.tp_size}
        tp_size = tp_sizes.get(self.engine, per_engine)
        if tp_size != per_engine:
            raise ValueError(
                f"{self.engine}.tp_size = {tp_size} and inference_num_gpus_per_engine = "
                f"{per_engine} differ; allowed: the same number for both"
            )
        return self
