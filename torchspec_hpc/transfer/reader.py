"""Reads the object that a receipt tells of."""

from __future__ import annotations

import torch

from torchspec_hpc.errors import TorchspecError
from torchspec_hpc.transfer.buffers import BufferPool
from torchspec_hpc.transfer.messages import Receipt
from torchspec_hpc.transfer.store import HiddenStateStore

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WrongStates(TorchspecError):
    """An engine answers with states that cannot be those of the sample."""


class Reader:
    """Reads hidden states into memory that is used again; for one thread.

    Args:
        store: This rank's client.
    """

    def __init__(self, store: HiddenStateStore) -> None:
        self._store, self._pool = store, BufferPool(store)

    def read(self, receipt: Receipt, num_tokens: int) -> torch.Tensor:
        """Hidden states ``[T, A + 1, H]``.

        Raises:
            WrongStates: They are not of ``num_tokens`` tokens, or of a type we do not know.
            ObjectGone: The object is missing, lost, damaged, or not what the receipt says.
        """
        if receipt.shape[0] != num_tokens or receipt.dtype not in _DTYPES:
            raise WrongStates(
                f"engine {receipt.engine} answered {num_tokens} tokens "
                f"with {receipt.dtype} states of shape {receipt.shape}"
            )
        states = self._pool.lend(receipt.shape, _DTYPES[receipt.dtype])
        self._store.get_into(receipt.key, states, receipt.checksum)
        return states
