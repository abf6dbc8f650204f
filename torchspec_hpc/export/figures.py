"""Statistics of an evaluation: intervals and percentiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Lower and upper end.
Interval = tuple[float, float]
NUM_RESAMPLES = 2000


def accept_len_interval(counts: Sequence[tuple[int, int]], seed: int = 0) -> Interval:
    """95 % interval of ``1 + accepted / drafts``, by bootstrap over conversations.

    Conversations, not drafts, are drawn: drafts of one conversation are alike.

    Args:
        counts: Drafts and accepted tokens of each conversation.
        seed: Of the draws; the same counts give the same interval.
    """
    drafts, accepted = np.asarray(counts, dtype=np.int64).T
    random = np.random.default_rng(seed)
    drawn = random.integers(len(drafts), size=(NUM_RESAMPLES, len(drafts)))
    # a conversation that ended before its first draft counts nothing
    totals = drafts[drawn].sum(1)
    lengths = 1 + accepted[drawn].sum(1) / np.maximum(totals, 1)
    low, high = np.percentile(lengths, [2.5, 97.5])
    return float(low), float(high)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` percent of the values do not exceed, interpolated."""
    return float(np.percentile(values, share))
