"""The copy of a training state that is written while training changes the original."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.staging import BlockingAsyncStager


class Stager(BlockingAsyncStager):
    """Copies a state to the CPU, into the same memory at every save.

    torch's newer DefaultStager would do, but that of torch 2.11 fails on every DTensor:
    "KeyError: <class 'type'>".

    Args:
        pinned: Into memory that a GPU writes to directly.
    """

    def __init__(self, pinned: bool) -> None:
        super().__init__(cache_staged_state_dict=True)
        self._pinned = pinned

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the copy, which the next call overwrites."""
        if self.state_dict_cache is None and not self._pinned:
            # what torch keeps it also pins, which takes a GPU
            self.state_dict_cache = BlockingAsyncStager().stage(state_dict)
        staged: dict[str, Any] = super().stage(state_dict)
        return staged
