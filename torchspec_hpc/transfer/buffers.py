"""Memory that objects are read into, registered once and used again and again."""

from __future__ import annotations

import math
import weakref
from collections import deque

import torch

from torchspec_hpc.transfer.store import HiddenStateStore

_GRANULE_BYTES = 1024**2


class BufferPool:
    """Lends tensors over registered memory; for one lending thread.

    A buffer comes back by itself when the last tensor or view over it is gone, so
    nobody has to copy a tensor in order to keep it, and nobody can forget to give
    it back.

    Fresh memory costs a page fault every 4 KiB, and registration for RDMA far
    more: that is what the pool saves.  It holds as many buffers as were ever lent
    at one time, each as large as the largest tensor it had to hold.

    Args:
        store: Registers the memory.
        pin: Whether a GPU copies from or to it beside its computations.
    """

    def __init__(self, store: HiddenStateStore, *, pin: bool = False) -> None:
        self._store, self._pin = store, pin
        self._free: list[torch.Tensor] = []
        # finalizers run in any thread, within any allocation: deque.append takes no lock
        self._returned: deque[torch.Tensor] = deque()

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with arbitrary content; ``shape`` is not empty."""
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._take(num_bytes)
        # a storage made from an array keeps that very array alive, and nothing else does:
        # a weak reference to it tells when the storage, shared by all views, is freed
        lease = buffer[:num_bytes].numpy()
        weakref.finalize(lease, self._returned.append, buffer)
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> torch.Tensor:
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort(key=lambda buffer: buffer.nbytes)
        for i, buffer in enumerate(self._free):
            if buffer.nbytes >= num_bytes:
                return self._free.pop(i)
        if self._free:  # the largest is too small: replace it
            self._store.unregister(self._free.pop())
        num_granules = -(-num_bytes // _GRANULE_BYTES)
        buffer = torch.empty(num_granules * _GRANULE_BYTES, dtype=torch.uint8, pin_memory=self._pin)
        self._store.register(buffer)
        return buffer
