"""Which samples are trained on when: a pure function of lengths, seed and position.

The stream is infinite: epoch after epoch, each with its own packs in its own order. An optimizer
step takes the next packs of it, however many trainers share them, so resuming needs one number:
the cursor.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.packing import Packs, best_fit, in_groups, longest_pack, next_fit

_SAMPLES, _PACKS = 0, 1  # what a permutation is of


class Sampler:
    """The stream of packs; any number of threads may use it.

    Args:
        lengths: ``[num_samples]``, tokens of each sample of the dataset.
        config: Seed, and how samples are packed.
        shuffle: False keeps the order of the file, in every epoch.

    Raises:
        ConfigError: The longest sample fits into no pack.
    """

    def __init__(self, lengths: NDArray[np.integer], config: TrainingConfig, shuffle: bool) -> None:
        self.longest_pack = longest_pack(lengths, config)
        self._lengths, self._config, self._shuffle = lengths, config, shuffle
        self._lock = threading.Lock()
        self._starts = [0]  # position where each epoch begins, as far as is known
        self._packed: dict[int, Future[Packs]] = {}
        self._packer = ThreadPoolExecutor(1, "packer")

    def samples_at(self, position: int) -> NDArray[np.int64]:
        """Dataset indices of the pack at a position of the stream, which counts from 0."""
        with self._lock:
            epoch = self._epoch(position)
            packs = self._packs(epoch)
            # a second of work for a million samples, which nobody should wait for at the border
            self._begin(epoch + 1)
            return packs[position - self._starts[epoch]]

    def epochs_at(self, cursor: int) -> float:
        """Passes over the data once all packs before the cursor are done."""
        with self._lock:
            epoch = self._epoch(cursor)
            start, end = self._starts[epoch : epoch + 2]
            return epoch + (cursor - start) / (end - start)

    def end_of(self, num_epochs: int) -> int:
        """Position at which so many epochs are over."""
        with self._lock:
            return self._start(num_epochs)

    def _epoch(self, position: int) -> int:
        """The epoch of a position; ``_starts`` reaches to its end."""
        if position < 0:
            raise ValueError(f"position = {position}; allowed: 0 and up")
        while self._starts[-1] <= position:
            self._start(len(self._starts))
        return bisect_right(self._starts, position) - 1

    def _start(self, epoch: int) -> int:
        """Where an epoch begins; the number of packs before it is known once they are made."""
        while len(self._starts) <= epoch:
            num_packs = len(self._packs(len(self._starts) - 1))
            self._starts.append(self._starts[-1] + num_packs)
        return self._starts[epoch]

    def _packs(self, epoch: int) -> Packs:
        """The packs of an epoch; waits until they are made."""
        return self._begin(epoch).result()

    def _begin(self, epoch: int) -> Future[Packs]:
        """Has an epoch packed in the background; only it and one beside it are kept."""
        if epoch not in self._packed:
            self._packed = {e: p for e, p in self._packed.items() if abs(e - epoch) == 1}
            self._packed[epoch] = self._packer.submit(self._pack_epoch, epoch)
        return self._packed[epoch]

    def _pack_epoch(self, epoch: int) -> Packs:
        config, num_samples = self._config, len(self._lengths)
        order = np.arange(num_samples)
        if self._shuffle:
            order = _permutation(num_samples, config.seed, epoch, _SAMPLES)
        if config.pack_tokens is None:
            assert config.micro_batch_size is not None
            return in_groups(order, config.micro_batch_size)
        if not self._shuffle:
            return next_fit(self._lengths, order, config.pack_tokens)
        packs = best_fit(self._lengths, order, config.pack_tokens)
        # best fit leaves full packs first and what is left over last
        return packs.reordered(_permutation(len(packs), config.seed, epoch, _PACKS))


def _permutation(num: int, seed: int, epoch: int, kind: int) -> NDArray[np.int64]:
    """Order of one epoch's samples or packs.

    Sorting raw bits, not ``Generator.permutation``: numpy keeps the bits of PCG64 the same for
    ever, but not what Generator makes of them (NEP 19), and a run may be resumed years later.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch, kind))).random_raw(num)
    return np.argsort(bits, kind="stable")


def positions_of(step_cursor: int, world_size: int, rank: int, num_micro_batches: int) -> list[int]:
    """Stream positions that one rank takes in one optimizer step.

    Together the ranks take ``[cursor, cursor + world_size * num_micro_batches)``, each position
    once; the ranks' packs of one micro-batch lie next to each other.

    Args:
        step_cursor: First position of the step.
        world_size: Trainer ranks.
        rank: This one.
        num_micro_batches: Micro-batches per step.

    Returns:
        The pack of each micro-batch.
    """
    return [step_cursor + m * world_size + rank for m in range(num_micro_batches)]
