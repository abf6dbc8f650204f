"""Documents in one row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from torchspec_hpc.drafts.batch import pack


def test_pack_and_positions() -> None:
    states = [torch.randn(t, 4, 3) for t in (3, 1, 2)]
    ids = [np.array([7, 8, 9], np.int32), np.array([1], np.int32), np.array([2, 3], np.int32)]
    masks = [np.array([0, 1, 1], bool), np.array([1], bool), np.array([0, 1], bool)]
    batch = pack(list(zip(ids, masks, states, strict=True)))
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 2, 3]
    assert batch.input_ids.dtype == torch.int64
    assert batch.loss_mask.tolist() == [False, True, True, True, False, True]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.document_ids.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.tokens_left.tolist() == [2, 1, 0, 0, 1, 0]
    # aux layers side by side, ascending; the last layer apart
    assert torch.equal(batch.aux[3], states[1][0, :3].flatten())
    assert torch.equal(batch.last, torch.cat([s[:, 3] for s in states]))


def test_to_casts_hidden_states_only() -> None:
    batch = pack([([1, 2], [True, False], torch.randn(2, 2, 3))]).to("cpu", torch.bfloat16)
    assert batch.aux.dtype == batch.last.dtype == torch.bfloat16
    assert batch.input_ids.dtype == batch.cu_seqlens.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool


def test_lengths_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"sample 1 .* 2 tokens.* 3 .*\(2, 2, 3\)"):
        pack([([1], [1], torch.zeros(1, 2, 3)), ([1, 2], [1, 1, 1], torch.zeros(2, 2, 3))])
    with pytest.raises(ValueError, match="at least one sample"):
        pack([])
