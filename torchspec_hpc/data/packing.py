"""Which samples share a micro-batch: packs, one row of tokens each, without padding.

A pack is one micro-batch. Its samples are laid one after the other, so the work of a step follows
from its tokens, not from its longest sample. Packs are a pure function of their arguments: resumed
runs depend on every choice that is made here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.errors import ConfigError

#: Samples that are packed together: enough for tight packs, few enough to stay a random draw.
WINDOW = 4096


@dataclass(frozen=True)
class Packs:
    """Samples by pack.

    Attributes:
        samples: int64 ``[S]``, dataset indices, pack after pack.
        offsets: int64 ``[P+1]``, where in them each pack starts, and S.
    """

    samples: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        return self.samples[self.offsets[pack] : self.offsets[pack + 1]]

    def reordered(self, order: NDArray[np.int64]) -> Packs:
        """The same packs one after the other in another order, int64 ``[P]``."""
        sizes = np.diff(self.offsets)[order]
        offsets = _offsets(sizes)
        within = np.arange(len(self.samples)) - np.repeat(offsets[:-1], sizes)
        return Packs(self.samples[np.repeat(self.offsets[order], sizes) + within], offsets)


def best_fit(lengths: NDArray[np.integer], order: NDArray[np.int64], max_tokens: int) -> Packs:
    """Fills packs tightly: best fit decreasing, window by window of the order.

    Chat data leave one or two percent of the packs empty.

    Args:
        lengths: ``[num_samples]``, tokens of each sample, none above `max_tokens`.
        order: ``[S]``, dataset indices.
        max_tokens: Of a pack.
    """
    packs = np.empty(len(order), dtype=np.int64)  # of each place of `order`
    num_packs = 0
    for start in range(0, len(order), WINDOW):
        window = lengths[order[start : start + WINDOW]].astype(np.int64)
        longest_first = np.argsort(-window, kind="stable")
        chosen = _best_fit_decreasing(window[longest_first].tolist(), max_tokens)
        packs[start + longest_first] = num_packs + np.array(chosen)
        num_packs += max(chosen) + 1
    by_pack = np.argsort(packs, kind="stable")
    return Packs(order[by_pack], _offsets(np.bincount(packs, minlength=num_packs)))


def _best_fit_decreasing(lengths: list[int], max_tokens: int) -> list[int]:
    """The pack of each sample of one window, longest first: the fullest one with room for it."""
    shift = len(lengths).bit_length()
    open_packs: list[int] = []  # ascending; tokens left and number of the pack in one integer
    chosen, num_packs = [], 0
    for length in lengths:
        place = bisect_left(open_packs, length << shift)
        if place < len(open_packs):
            left = open_packs.pop(place) - (length << shift)
            pack = left & ((1 << shift) - 1)
        else:
            pack = num_packs
            left = ((max_tokens - length) << shift) + pack
            num_packs += 1
        chosen.append(pack)
        if left >> shift:
            insort(open_packs, left)
    return chosen


def next_fit(lengths: NDArray[np.integer], order: NDArray[np.int64], max_tokens: int) -> Packs:
    """Keeps the order: a pack ends where the next sample does not fit any more.

    Args:
        lengths: ``[num_samples]``, tokens of each sample, none above `max_tokens`.
        order: ``[S]``, dataset indices.
        max_tokens: Of a pack.
    """
    ends = np.cumsum(lengths[order], dtype=np.int64)
    offsets, filled = [0], 0
    while offsets[-1] < len(order):
        offsets.append(int(np.searchsorted(ends, filled + max_tokens, side="right")))
        filled = int(ends[offsets[-1] - 1])
    return Packs(order, np.array(offsets))


def in_groups(order: NDArray[np.int64], size: int) -> Packs:
    """Packs of `size` samples, whatever their lengths; the last one may have fewer."""
    return Packs(order, np.append(np.arange(0, len(order), size), len(order)))


def longest_pack(lengths: NDArray[np.integer], config: TrainingConfig) -> int:
    """Most tokens that a pack of these samples can have.

    Args:
        lengths: ``[num_samples]``, tokens of each sample.
        config: How they are packed.

    Raises:
        ConfigError: The longest sample fits into no pack.
    """
    longest = int(lengths.max())
    if config.pack_tokens is None:
        assert config.micro_batch_size is not None
        return longest * min(config.micro_batch_size, len(lengths))
    if longest > config.pack_tokens:
        raise ConfigError(
            f"training.micro_batch_tokens = {config.pack_tokens} is less than the longest "
            f"sample, {longest} tokens",
            allowed=f"training.micro_batch_tokens of at least {longest}",
            hint="raise it, or lower training.max_seq_length to it: longer samples are truncated",
        )
    return min(config.pack_tokens, int(lengths.sum(dtype=np.int64)))


def _offsets(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.append(0, np.cumsum(sizes))
