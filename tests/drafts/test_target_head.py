"""The target's head."""

from __future__ import annotations

import pytest
import torch

from torchspec_hpc.drafts import target_head
from torchspec_hpc.drafts.target_head import TargetHead, row_argmax


def make(dtype: torch.dtype = torch.float32) -> tuple[TargetHead, torch.Tensor]:
    torch.manual_seed(0)
    norm, lm_head = torch.rand(16).to(dtype), torch.randn(50, 16).to(dtype)
    return TargetHead(norm, lm_head, 1e-5), torch.randn(23, 16).to(dtype)


def test_logits_of_all_and_of_kept_rows() -> None:
    head, y = make()
    normed = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * head.norm
    logits = normed @ head.lm_head.T
    torch.testing.assert_close(head.logits(y), logits)
    kept = torch.tensor([3, 4, 49])
    torch.testing.assert_close(head.rows(kept).logits(y), logits[:, kept])
    assert head.rows(None) is head


def test_the_head_is_frozen() -> None:
    head, y = make(torch.bfloat16)
    assert not any(p.requires_grad for p in head.parameters())
    assert not head.state_dict()
    assert not head.logits(y.requires_grad_()).requires_grad


@pytest.mark.parametrize("num_rows", [0, 1, 23])
def test_argmax_in_chunks(monkeypatch: pytest.MonkeyPatch, num_rows: int) -> None:
    monkeypatch.setattr(target_head, "CHUNK_BYTES", {"cpu": 5 * 4 * 50})
    head, y = make()
    assert torch.equal(head.argmax(y[:num_rows]), head.logits(y[:num_rows]).argmax(-1))


@pytest.mark.parametrize("vocab", [50, 64, 640])
def test_row_argmax_is_argmax(vocab: int) -> None:
    x = torch.randint(0, 9, (3, 5, vocab), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(row_argmax(x), x.argmax(-1))  # the first of many equals
    x[1, 2, 7] = float("nan")
    assert row_argmax(x)[1, 2] == 7
    assert row_argmax(x[:0]).shape == (0, 5)
