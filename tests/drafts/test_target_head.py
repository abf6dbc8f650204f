"""The target's head, and which of its rows are computed."""

from __future__ import annotations

import pytest
import torch

from torchspec_hpc.drafts import target_head
from torchspec_hpc.drafts.target_head import TargetHead, target_argmax


def make(dtype: torch.dtype = torch.float32) -> tuple[TargetHead, torch.Tensor]:
    torch.manual_seed(0)
    norm, lm_head = torch.rand(16).to(dtype), torch.randn(50, 16).to(dtype)
    return TargetHead(norm, lm_head, 1e-5), torch.randn(23, 16).to(dtype)


def test_logits() -> None:
    head, y = make()
    normed = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm
    logits = normed @ head.lm_head.T
    torch.testing.assert_close(head(y), logits)
    kept = torch.tensor([3, 4, 49])
    torch.testing.assert_close(head(y, kept), logits[:, kept])


def test_low_precision_states_give_float32_logits() -> None:
    head, y = make(torch.bfloat16)
    assert head(y).dtype == torch.float32
    assert not any(p.requires_grad for p in head.parameters())


def test_argmax_of_needed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "ROWS_PER_CHUNK", 5)
    head, y = make()
    expected = head(y).argmax(-1)
    assert torch.equal(target_argmax(head, y), expected)
    needed = torch.rand(23) < 0.5
    found = target_argmax(head, y, needed)
    assert torch.equal(found[needed], expected[needed])
    assert not found[~needed].any()
    assert not target_argmax(head, y, torch.zeros(23, dtype=torch.bool)).any()
