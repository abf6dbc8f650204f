"""Puts states into the store while the engine computes the next ones."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from torchspec_hpc.errors import TorchspecError, UserError
from torchspec_hpc.inference.engines.base import Captured, Failed, Result
from torchspec_hpc.transfer.store import HiddenStateStore


class StateWriter:
    """Writes tensors in the background; :meth:`drain` says what became of them.

    Args:
        store: An open connection, closed by :meth:`close`.
        num_threads: Writes at a time.  More than one, so that one trainer's full
            segment does not hold up another trainer's data.
    """

    def __init__(self, store: HiddenStateStore, num_threads: int = 4) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="state-writer")
        self._pending: list[Future[Result]] = []

    def submit(self, key: str, segment: str, states: torch.Tensor) -> None:
        """Starts one write.

        Args:
            key: Name of the object.
            segment: The memory segment to prefer.
            states: ``[T, A + 1, H]`` on any device; it must not change afterwards.
        """
        host = states.to("cpu").contiguous()
        self._pending.append(self._pool.submit(self._put, key, segment, host))

    def drain(self) -> list[Result]:
        """Waits for every write since the last call and returns their results."""
        pending, self._pending = self._pending, []
        return [future.result() for future in pending]

    def close(self) -> None:
        """Closes the store; a write that waits for room fails at its next try."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._store.close()

    def _put(self, key: str, segment: str, states: torch.Tensor) -> Result:
        try:
            self._store.put(key, states, segment)
        except UserError as error:  # larger than a segment: it will never fit
            return Failed(key, str(error), permanent=True)
        except TorchspecError as error:  # full or gone: the requester asks again
            return Failed(key, str(error), permanent=False)
        shape = (states.shape[0], states.shape[1], states.shape[2])
        return Captured(key, shape, str(states.dtype).removeprefix("torch."))
