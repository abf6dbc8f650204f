"""Decides, from vLLM's scheduler output, in which step a prompt's states are complete.

A prompt's rows may be computed in one step or in several (chunked prefill), may
come from the prefix cache, and may be lost and computed again (preemption).  Each
row is written to the cache blocks of its prompt in the step that computes it, so
the states are complete in the step where the tokens computed before it and the
tokens scheduled in it reach the end of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torchspec_hpc.inference.delivery import Destination

#: Key in ``SamplingParams.extra_args`` that vLLM hands to connectors unread.
TRANSFER_PARAMS = "kv_transfer_params"
#: What a finished request says under this key: whether its states were captured.
CAPTURED = "captured"


@dataclass(frozen=True)
class Save:
    """Instruction to the worker: these rows are complete at the end of this step.

    Attributes:
        destination: Where they go, and who is told.
        num_tokens: Rows, T.
        block_ids: Cache blocks that hold them, in order.
    """

    destination: Destination
    num_tokens: int
    block_ids: tuple[int, ...]


@dataclass
class _Prompt:
    destination: Destination
    num_tokens: int
    block_ids: list[int] = field(default_factory=list)
    saved: bool = False


class PromptTracker:
    """Follows every prompt from its first step to the one that completes it.

    Args:
        group: Index of the cache group that holds hidden states.
    """

    def __init__(self, group: int) -> None:
        self._group = group
        self._prompts: dict[str, _Prompt] = {}

    def step(self, output: Any) -> list[Save]:
        """Takes in one scheduler step.

        Args:
            output: vLLM's ``SchedulerOutput``; it is not changed.

        Returns:
            What to save at the end of this step, each prompt exactly once in its life.
        """
        scheduled: dict[str, int] = output.num_scheduled_tokens
        saves: list[Save | None] = []
        for new in output.scheduled_new_reqs:
            prompt = self._prompts.get(new.req_id) or self._begin(new)
            if prompt is None:
                continue  # not ours: warm-up, or somebody else's request
            # a preempted request may come back as a new one: its blocks are all new, too
            prompt.block_ids = list(new.block_ids[self._group])
            done = new.num_computed_tokens + scheduled.get(new.req_id, 0)
            saves.append(_complete(prompt, done))
        cached = output.scheduled_cached_reqs
        for row, req_id in enumerate(cached.req_ids):
            prompt = self._prompts.get(req_id)
            if prompt is None:
                continue
            if req_id in cached.resumed_req_ids:
                prompt.block_ids.clear()
            new_blocks: Sequence[Sequence[int]] | None = cached.new_block_ids[row]
            if new_blocks is not None:
                prompt.block_ids.extend(new_blocks[self._group])
            done = cached.num_computed_tokens[row] + scheduled.get(req_id, 0)
            saves.append(_complete(prompt, done))
        return [save for save in saves if save is not None]

    def forget(self, req_id: str) -> bool:
        """Drops a request that finished or was aborted; returns whether it was saved."""
        prompt = self._prompts.pop(req_id, None)
        return prompt is not None and prompt.saved

    def _begin(self, new: Any) -> _Prompt | None:
        extra = new.sampling_params.extra_args if new.sampling_params is not None else None
        params = (extra or {}).get(TRANSFER_PARAMS)
        if params is None:
            return None
        prompt = _Prompt(Destination(**params), len(new.prompt_token_ids))
        self._prompts[new.req_id] = prompt
        return prompt


def _complete(prompt: _Prompt, done: int) -> Save | None:
    if prompt.saved or done < prompt.num_tokens:
        return None
    prompt.saved = True
    return Save(prompt.destination, prompt.num_tokens, tuple(prompt.block_ids))
