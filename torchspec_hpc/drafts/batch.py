"""A micro-batch: documents laid one after the other in a single row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Token ids [T], loss mask [T] (arrays or tensors) and hidden states [T, A+1, H] of a document.
PackedSample = tuple[Any, Any, Tensor]


@dataclass
class PackedBatch:
    """D documents of N tokens in all. Nothing computed from it may cross a document's end.

    Attributes:
        input_ids: [N] int64.
        loss_mask: [N] bool; True where the token is one that the draft should learn to predict.
        cu_seqlens: [D+1] int64, starts of the documents and N.
        aux: [N, A*H], residual streams after the aux layers, ascending.
        last: [N, H], residual stream after the last layer, before the final norm.
    """

    input_ids: Tensor
    loss_mask: Tensor
    cu_seqlens: Tensor
    aux: Tensor
    last: Tensor

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.input_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """[D] int64, tokens of each document."""
        return self.cu_seqlens.diff()

    @property
    def document_ids(self) -> Tensor:
        """[N] int64, the document that each token belongs to."""
        return torch.repeat_interleave(self.lengths, output_size=self.num_tokens)

    @property
    def position_ids(self) -> Tensor:
        """[N] int64, positions within the document."""
        index = torch.arange(self.num_tokens, device=self.input_ids.device)
        return index - self.cu_seqlens[self.document_ids]

    @property
    def tokens_left(self) -> Tensor:
        """[N] int64, tokens that follow in the same document."""
        return self.lengths[self.document_ids] - 1 - self.position_ids

    def to(self, device: torch.device | str, dtype: torch.dtype) -> PackedBatch:
        """Returns the batch on ``device``, hidden states in ``dtype``."""
        return PackedBatch(
            input_ids=upload(self.input_ids, device),
            loss_mask=upload(self.loss_mask, device),
            cu_seqlens=upload(self.cu_seqlens, device),
            # large: pinned by who packs, or copied as they are
            aux=self.aux.to(device, dtype, non_blocking=True),
            last=self.last.to(device, dtype, non_blocking=True),
        )


def upload(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copies a CPU tensor without waiting for what the device still has to do.

    A copy from memory that is not pinned would wait.  PyTorch keeps the pinned memory until the
    copy is done.
    """
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # itself, if it is pinned
    return x.to(device, dtype, non_blocking=True)


def pack(samples: Sequence[PackedSample]) -> PackedBatch:
    """Lays documents one after the other.

    Args:
        samples: For each document its token ids [T], its loss mask [T] and its hidden states
            [T, A+1, H]: the aux layers ascending, then the last layer.

    Raises:
        ValueError: No samples, or lengths that do not belong together.
    """
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    for index, (input_ids, loss_mask, states) in enumerate(samples):
        if not len(input_ids) == len(loss_mask) == states.shape[0] > 0:
            raise ValueError(
                f"sample {index} of the micro-batch has {len(input_ids)} tokens, a loss mask of "
                f"{len(loss_mask)} and hidden states of {tuple(states.shape)}"
            )
    lengths = torch.tensor([0] + [states.shape[0] for *_, states in samples])
    return PackedBatch(
        input_ids=torch.cat([torch.as_tensor(ids).to(torch.int64) for ids, *_ in samples]),
        loss_mask=torch.cat([torch.as_tensor(mask).to(torch.bool) for _, mask, _ in samples]),
        cu_seqlens=lengths.cumsum(0),
        # joined, then flattened: the other way round each part would be copied twice
        aux=torch.cat([states[:, :-1] for *_, states in samples]).flatten(1),
        last=torch.cat([states[:, -1] for *_, states in samples]),
    )
