"""Which sample is trained on when: a pure function of seed and position.

The stream is infinite: epoch after epoch, each in its own order. An optimizer step takes the next
positions of it, however many trainers share them, so resuming needs one number: the cursor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class Sampler:
    """Order of the samples.

    Args:
        num_samples: Of the dataset.
        seed: Not negative.
        shuffle: False keeps the order of the file, in every epoch.
    """

    def __init__(self, num_samples: int, seed: int, shuffle: bool) -> None:
        if num_samples < 1 or seed < 0:
            raise ValueError(
                f"num_samples = {num_samples}, seed = {seed}; allowed: num_samples >= 1, seed >= 0"
            )
        self.num_samples, self.seed, self.shuffle = num_samples, seed, shuffle

    def index_at(self, position: int) -> int:
        """Dataset index at a position of the stream, which counts from 0."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch < 0:
            raise ValueError(f"position = {position}; allowed: 0 and up")
        if not self.shuffle:
            return offset
        return int(_permutation(self.num_samples, self.seed, epoch)[offset])


@lru_cache(maxsize=2)  # prefetching crosses the border of two epochs
def _permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Order of one epoch.

    Sorting raw bits, not ``Generator.permutation``: numpy keeps the bits of PCG64 the same for
    ever, but not what Generator makes of them (NEP 19), and a run may be resumed years later.
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


def positions_of(
    step_cursor: int, world_size: int, rank: int, micro_batch_size: int, num_micro_batches: int
) -> list[list[int]]:
    """Stream positions that one rank takes in one optimizer step.

    Together the ranks take ``[cursor, cursor + world_size * micro_batch_size *
    num_micro_batches)``, each position once.

    Args:
        step_cursor: First position of the step.
        world_size: Trainer ranks.
        rank: This one.
        micro_batch_size: Samples per rank and micro-batch.
        num_micro_batches: Micro-batches per step.

    Returns:
        For each micro-batch its positions.
    """
    starts = [
        step_cursor + (micro_batch * world_size + rank) * micro_batch_size
        for micro_batch in range(num_micro_batches)
    ]
    return [list(range(start, start + micro_batch_size)) for start in starts]
