"""Answers that run in circles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_NGRAM = 4
#: An answer that is still being generated is looked at twice in as many tokens.
WINDOW_TOKENS = 64
_MIN_DISTINCT = 0.5


def is_loop(tokens: Sequence[Any]) -> bool:
    """Whether an answer, or its last 64 tokens, mostly repeats its own 4-grams."""
    for part in (tokens, tokens[-WINDOW_TOKENS:]):
        num_ngrams = len(part) - _NGRAM + 1
        if num_ngrams < WINDOW_TOKENS // 2:
            return False
        ngrams = {tuple(part[i : i + _NGRAM]) for i in range(num_ngrams)}
        if len(ngrams) < _MIN_DISTINCT * num_ngrams:
            return True
    return False
