"""Memory that objects are read into, registered once and used again and again."""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch

from torchspec_hpc.transfer.store import HiddenStateStore

#: Few sizes, so that a buffer fits the next sample too
_GRANULE_BYTES = 1024**2


class BufferPool:
    """Lends tensors over registered memory; not for use by several threads at once.

    A buffer comes back by itself when the last tensor or view over it is gone.
    So a tensor may be kept as long as one likes, and copied by nobody.

    Fresh memory costs a page fault every 4 KiB, and registration for RDMA far
    more; that is what the pool saves.  It holds as many buffers as were ever lent
    at one time, each as large as the largest sample it had to hold.
    """

    def __init__(self, store: HiddenStateStore) -> None:
        self._store = store
        self._free: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
        # finalizers run in any thread, at any allocation: deque.append takes no lock
        self._returned: deque[np.ndarray[tuple[int], np.dtype[np.uint8]]] = deque()

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with arbitrary content.

        Args:
            shape: Of the tensor; not empty.
            dtype: Of the tensor.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._take(num_bytes)
        view = buffer[:num_bytes]
        # torch's storage keeps this array alive, and nothing else does
        lease = view.view()
        weakref.finalize(lease, self._returned.append, buffer)
        return torch.from_numpy(lease).view(dtype).view(shape)

    def _take(self, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort(key=len)
        for i, buffer in enumerate(self._free):
            if len(buffer) >= num_bytes:
                return self._free.pop(i)
        if self._free:  # the largest free one is too small: replace it
            self._store.unregister(torch.from_numpy(self._free.pop()))
        granules = -(-num_bytes // _GRANULE_BYTES)
        buffer = np.empty(granules * _GRANULE_BYTES, dtype=np.uint8)
        self._store.register(torch.from_numpy(buffer))
        return buffer
