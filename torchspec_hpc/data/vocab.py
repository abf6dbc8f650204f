"""The rows of the target's vocabulary that a pruned draft head keeps."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from torchspec_hpc.data.shards import TokenDataset
from torchspec_hpc.errors import ConfigError

logger = logging.getLogger(__name__)


def draft_vocabulary(
    dataset: TokenDataset, vocab_size: int, draft_vocab_size: int, special_ids: Iterable[int]
) -> NDArray[np.int64]:
    """Ids that the assistant says most often; the lower id wins a tie.

    Args:
        dataset: Its supervised tokens are counted.
        vocab_size: Rows of the target's head, V.
        draft_vocab_size: Ids to keep.
        special_ids: Kept however rare they are: end of turn and the like.

    Returns:
        Target ids, ascending, int64 ``[draft_vocab_size]``. Always as many as asked for: ids that
        never occur fill up, lowest first.

    Raises:
        ConfigError: The sizes do not fit each other.
    """
    special = np.unique(np.fromiter(special_ids, dtype=np.int64))
    if not len(special) <= draft_vocab_size <= vocab_size:
        raise ConfigError(
            f"model.draft_vocab_size = {draft_vocab_size}",
            allowed=f"{len(special)} special tokens to {vocab_size}, the target's vocabulary",
        )
    if len(special) and not 0 <= special[0] <= special[-1] < vocab_size:
        raise ConfigError(
            f"special token ids {special.tolist()} do not fit a vocabulary of {vocab_size}",
            hint="the tokenizer and the config.json of the target do not belong together",
        )
    counts = count_supervised(dataset, vocab_size)
    rank = counts.copy()
    rank[special] = np.iinfo(np.int64).max
    kept = np.sort(np.argsort(-rank, kind="stable")[:draft_vocab_size])
    share = coverage(counts, kept)
    logger.info("draft vocabulary: %d ids cover %.2f %% of tokens", len(kept), 100 * share)
    return kept


def coverage(counts: NDArray[np.int64], kept_ids: NDArray[np.int64]) -> float:
    """Share of the supervised tokens that a draft head with these ids can say.

    Args:
        counts: ``[V]``, from :func:`count_supervised`.
        kept_ids: ``[draft_vocab_size]``.
    """
    return float(counts[kept_ids].sum() / counts.sum())


def count_supervised(dataset: TokenDataset, vocab_size: int) -> NDArray[np.int64]:
    """How often the assistant says each token.

    Args:
        dataset: Read in order, once, a shard at a time.
        vocab_size: Rows of the target's head, V.

    Returns:
        int64 ``[V]``.

    Raises:
        ConfigError: A token has no row in the target's head.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for said in dataset.supervised_tokens():
        found = np.bincount(said, minlength=vocab_size)
        if len(found) > vocab_size:
            raise ConfigError(
                f"the data holds token id {len(found) - 1}, the target's vocabulary is "
                f"{vocab_size}",
                hint="the tokenizer and the config.json of the target do not belong together",
            )
        counts += found
    return counts
