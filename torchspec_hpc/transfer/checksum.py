"""A checksum of hidden states that costs next to nothing."""

from __future__ import annotations

import zlib

import numpy as np
import torch

_BLOCK_BYTES = 4096


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the sums of all 4 KiB blocks, and of the bytes after the last whole one.

    A CRC of every byte reads 4 GB/s, slower than the transfer itself; sums read as fast as
    memory is.  Changed, missing and exchanged blocks are found; not found is only what
    leaves the sum of a block's 8-byte words, modulo 2**64, as it was.

    Args:
        tensor: Contiguous, on the CPU.
    """
    data = tensor.view(-1).view(torch.uint8).numpy()
    end = data.size // _BLOCK_BYTES * _BLOCK_BYTES
    blocks = data[:end].view(np.uint64).reshape(-1, _BLOCK_BYTES // 8)
    return zlib.crc32(data[end:].data, zlib.crc32(blocks.sum(axis=1).data))
