"""What prepared data would cost and how well they pack, without reading a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.config.schema import TrainingConfig
from torchspec_hpc.data.sampler import Sampler
from torchspec_hpc.data.shards import TokenDataset

_NUM_BINS = 12


@dataclass(frozen=True)
class Summary:
    """Figures of a prepared data set.

    Attributes:
        histogram: Lengths: from, up to and with, number of samples.
        mean_length: Tokens.
        supervised_share: Supervised tokens by all tokens.
        num_packs: Micro-batches of an epoch.
        pack_tokens: Most tokens of one.
        filled: Mean share of a micro-batch's tokens that are filled.
        state_bytes: Of the hidden states of one epoch, all trainers together.
        pack_bytes: Of those of the fullest micro-batch.
        hours: Of one epoch at the given throughput; None if none was given.
    """

    histogram: list[tuple[int, int, int]]
    mean_length: float
    supervised_share: float
    num_packs: int
    pack_tokens: int
    filled: float
    state_bytes: int
    pack_bytes: int
    hours: float | None


def summarize(
    dataset: TokenDataset,
    training: TrainingConfig,
    token_bytes: int,
    tokens_per_s: float | None,
    *,
    shuffle: bool = True,
) -> Summary:
    """Figures of a data set as a run would use it.

    Args:
        dataset: Prepared.
        training: How samples are packed.
        token_bytes: Hidden states of one token.
        tokens_per_s: Throughput of the slower side.
        shuffle: As ``dataset.shuffle_dataset``.
    """
    lengths = dataset.lengths
    sampler = Sampler(lengths, training, shuffle)
    num_packs = sampler.end_of(1)
    num_tokens = int(lengths.sum(dtype=np.int64))
    return Summary(
        histogram=_histogram(lengths),
        mean_length=num_tokens / len(lengths),
        supervised_share=float(dataset.column("supervised").sum(dtype=np.int64)) / num_tokens,
        num_packs=num_packs,
        pack_tokens=sampler.longest_pack,
        filled=num_tokens / (num_packs * sampler.longest_pack),
        state_bytes=num_tokens * token_bytes,
        pack_bytes=sampler.longest_pack * token_bytes,
        hours=num_tokens / tokens_per_s / 3600 if tokens_per_s else None,
    )


def _histogram(lengths: NDArray[Any]) -> list[tuple[int, int, int]]:
    edges = np.unique(np.linspace(lengths.min() - 1, lengths.max(), _NUM_BINS + 1).astype(np.int64))
    counts = np.bincount(np.searchsorted(edges, lengths) - 1, minlength=len(edges) - 1)
    return [(int(a) + 1, int(b), int(n)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]
