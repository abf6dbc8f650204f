"""The part of our vLLM engine that vLLM loads into its own processes.

vLLM (0.18 and later) can write hidden states into a paged cache of their own, one
slot for each token: speculative method ``extract_hidden_states``.  What leaves that
cache, and how, is the business of a KV connector, loaded by module path.  This one
copies a prompt's rows out of the cache in the very step that completes them, puts
them into the store and sends the receipt while later steps run, so nothing of a
prompt is ever waiting for the next step: the last prompt of an idle engine is
delivered, too, and no tensor travels between vLLM's processes.

vLLM makes one connector in the scheduler and one in each worker, and hands what
:meth:`CaptureConnector.build_connector_meta` returns from the former to the latter
in each step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from torchspec_hpc.config import RunDir, load_config
from torchspec_hpc.config.endpoints import Endpoints
from torchspec_hpc.inference.delivery import Delivery
from torchspec_hpc.inference.engines import vllm_compat
from torchspec_hpc.inference.engines.vllm_tracking import CAPTURED, PromptTracker, Save


@dataclass
class CaptureMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM has no types for us
    """What the scheduler tells the workers in one step."""

    saves: list[Save] = field(default_factory=list)


class CaptureConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Puts each prompt's hidden states into the store as soon as they are computed.

    ``kv_connector_extra_config``:
        run_dir: The run directory; configuration and endpoints are read there.
        rank: Inference rank.
        columns: Which captured layers make up the states, in order.
    """

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._run = RunDir(extra["run_dir"])
        self._rank: int = extra["rank"]
        self._columns: list[int] = extra["columns"]
        group, self._block_size = vllm_compat.states_group(kv_cache_config)
        self._tracker = PromptTracker(group)
        self._layer = ""
        self._delivery: Delivery | None = None

    # --- scheduler

    def build_connector_meta(self, scheduler_output: Any) -> CaptureMetadata:
        """Finds the prompts that this step completes."""
        return CaptureMetadata(self._tracker.step(scheduler_output))

    def request_finished(
        self,
        request: Any,
        block_ids: Any,  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any]]:
        """Forgets a request. Its rows were copied before, so its blocks may be freed."""
        return False, {CAPTURED: self._tracker.forget(request.request_id)}

    def request_finished_all_groups(
        self, request: Any, block_ids: Any
    ) -> tuple[bool, dict[str, Any]]:
        """The same, for targets that mix kinds of layers."""
        return self.request_finished(request, block_ids)

    def get_num_new_matched_tokens(
        self,
        request: Any,  # noqa: ARG002
        num_computed_tokens: int,  # noqa: ARG002
    ) -> tuple[int, bool]:
        """We bring no tokens in."""
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing to load into the blocks."""

    # --- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Connects to the services before the first prompt: without them there is no start."""
        self._layer = vllm_compat.states_layer(list(kv_caches))
        if get_tensor_model_parallel_rank() != 0:
            return  # every rank holds the same rows
        config = load_config(self._run.config)
        endpoints = Endpoints.read(self._run, config.control.service_ready_s)
        self._delivery = Delivery.open(config, self._run, endpoints, self._rank)

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: Any,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Copies what this step completed; vLLM calls this right after the cache write."""
        if layer_name != self._layer or self._delivery is None:
            return
        for save in self._get_connector_metadata().saves:
            states = vllm_compat.gather(kv_layer, save.block_ids, save.num_tokens, self._block_size)
            if self._columns != list(range(states.shape[1])):
                states = states[:, self._columns]
            self._delivery.submit(save.destination, states)

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """We bring no tokens in."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """We bring no tokens in."""

    def wait_for_save(self) -> None:
        """The rows are copies: the blocks may be used again before they are in the store."""

    def shutdown(self) -> None:
        """Closes the connections."""
        if self._delivery is not None:
            self._delivery.close()
            self._delivery = None

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """No: the states' cache must stay apart from the target's."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Whatever this release's own reader of the states' cache needs."""
        return vllm_compat.required_layout(vllm_config)
