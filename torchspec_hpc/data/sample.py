"""One conversation as numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """Tokens of one conversation and which of them the draft is trained to predict.

    Attributes:
        index: Position in the dataset, counts from 0.
        input_ids: int32 ``[T]``.
        loss_mask: bool ``[T]``; true where the assistant said the token.
    """

    index: int
    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
