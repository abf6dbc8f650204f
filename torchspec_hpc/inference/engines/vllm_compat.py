"""What differs between the vLLM releases that work here, 0.19 to 0.33.

Upstream ships a connector of its own for debugging, which writes files.  Two of the
functions below ask it how this release lays the states out, so that a change there
needs none here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import vllm.exceptions
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as upstream
from vllm.platforms import current_platform

#: ``cpu`` or ``cuda``: what this build of vLLM runs on.
DEVICE = str(current_platform.device_type)

#: What vLLM raises for a prompt or a setting that it refuses; the second one is newer.
REFUSALS: tuple[type[Exception], ...] = (
    ValueError,
    getattr(vllm.exceptions, "VLLMClientError", ValueError),
)

#: Part of the name of the only layer whose cache holds hidden states.
_CACHE_ONLY = "cache_only_layers"


def states_group(kv_cache_config: Any) -> tuple[int, int]:
    """Index and block size of the cache group that holds hidden states.

    The block size of the whole cache is another one where the target mixes kinds
    of layers.
    """
    groups = kv_cache_config.kv_cache_groups
    found = [
        index
        for index, group in enumerate(groups)
        if any(_CACHE_ONLY in name for name in group.layer_names)
    ]
    if len(found) != 1:
        raise RuntimeError(
            f"{len(found)} of vLLM's {len(groups)} cache groups hold hidden states, not one; "
            f"layers: {[list(group.layer_names) for group in groups]}"
        )
    return found[0], int(groups[found[0]].kv_cache_spec.block_size)


def states_layer(layer_names: Sequence[str]) -> str:
    """Name of the layer whose cache holds hidden states."""
    found = [name for name in layer_names if _CACHE_ONLY in name]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} of vLLM's layers hold hidden states: {found}, not one")
    return found[0]


def gather(cache: Tensor, block_ids: Sequence[int], num_tokens: int, block_size: int) -> Tensor:
    """Copies a prompt's rows out of the paged cache.

    Args:
        cache: Cache of the states layer; its axes are ``[block, token, state, H]`` up
            to vLLM 0.27 and ``[block, state, token, H]`` from 0.28 on.
        block_ids: Blocks of the prompt, in order.
        num_tokens: T.
        block_size: Tokens of a block.

    Returns:
        ``[T, states, H]``, on the cache's device.
    """
    blocks = torch.as_tensor(block_ids, device=cache.device)
    offsets = torch.arange(block_size, device=cache.device)
    slots = (blocks[:, None] * block_size + offsets).flatten()[:num_tokens]
    return cast("Tensor", upstream.extract_from_kv_cache(cache, slots, num_tokens))


def required_layout(vllm_config: Any) -> str | None:
    """The cache layout under which :func:`gather` holds."""
    layout = upstream.ExampleHiddenStatesConnector.get_required_kvcache_layout(vllm_config)
    return cast("str | None", layout)
