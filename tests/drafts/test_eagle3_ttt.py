"""Alignment, supervision, metrics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.ttt import (
    Supervision,
    accept_len,
    scored_rows,
    soft_cross_entropy,
    supervision,
)


def make_batch(*masks: list[int]) -> PackedBatch:
    """One document a mask, tokens 0, 1, 2 ... in each."""
    return pack([(torch.arange(len(m)), torch.tensor(m), torch.zeros(len(m), 2, 1)) for m in masks])


def pairs(mask: torch.Tensor) -> list[list[int]]:
    """The positions of each step."""
    return [step.nonzero()[:, 0].tolist() for step in mask]


def test_supervises_the_token_that_is_predicted() -> None:
    #                   tokens 0  1  2  3  4  5  6  7  8  9
    batch = make_batch([1, 1, 0, 0, 1, 1, 1, 0, 0, 1])
    found = supervision(batch, torch.zeros(10, dtype=torch.int64), None, 3)
    # step i at t predicts token t+2+i: tokens 4, 5, 6 and 9 are to be learned; tokens 0 and 1
    # are too, but nothing comes before them
    expected = [
        [2, 3, 4, 7],
        [1, 2, 3, 6],
        [0, 1, 2, 5],
    ]
    assert pairs(found.scored) == pairs(found.trained) == expected


def test_no_target_crosses_the_end_of_a_document() -> None:
    batch = make_batch([1, 1, 1, 1], [1], [1, 1], [1, 1, 1])
    found = supervision(batch, torch.zeros(10, dtype=torch.int64), None, 4)
    assert pairs(found.scored) == [[0, 1, 7], [0], [], []]


def test_a_target_outside_the_draft_vocabulary_is_scored_but_not_trained() -> None:
    batch = make_batch([1] * 6)
    argmax = torch.tensor([0, 7, 3, 3, 7, 7])  # of the token that follows each position
    kept = torch.arange(8) != 7
    found = supervision(batch, argmax, kept, 2)
    assert pairs(found.scored) == [[0, 1, 2, 3], [0, 1, 2]]
    assert pairs(found.trained) == [[1, 2], [0, 1]]  # compared with positions 2, 3


@settings(max_examples=60, deadline=None)
@given(
    masks=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=4),
    ttt_length=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_supervision_follows_the_table(masks: list[list[int]], ttt_length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = make_batch(*masks)
    argmax = torch.randint(0, 6, (batch.num_tokens,), generator=generator)
    kept = torch.randint(0, 2, (6,), generator=generator).bool()
    expected = Supervision(*torch.zeros(2, ttt_length, batch.num_tokens, dtype=torch.bool))
    start, read = 0, set()
    for mask in masks:
        for i in range(ttt_length):
            for t in range(len(mask)):
                if t + 2 + i <= len(mask) - 1 and mask[t + 2 + i]:
                    target = start + t + 1 + i
                    read.add(target)
                    expected.scored[i, start + t] = True
                    expected.trained[i, start + t] = kept[argmax[target]]
        start += len(mask)
    found = supervision(batch, argmax, kept, ttt_length)
    assert torch.equal(found.scored, expected.scored)
    assert torch.equal(found.trained, expected.trained)
    # the rows of the target's head that the trainer has to compute: no more, no less
    assert set(scored_rows(batch).nonzero()[:, 0].tolist()) == read


def test_soft_cross_entropy_of_low_precision_logits_is_float32() -> None:
    logits = torch.randn(5, 30).bfloat16()
    target = torch.randn(5, 30).softmax(-1)
    loss = soft_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    expected = -(target * logits.float().log_softmax(-1)).sum()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.0, 1.0, 1.0], 1.0),  # a chain breaks at its first miss
        ([1.0, 1.0, 1.0], 4.0),
        ([0.5, 0.5, 0.5], 1 + 0.5 + 0.25 + 0.125),
        ([0.8], 1.8),
    ],
)
def test_accept_len(accuracy: list[float], expected: float) -> None:
    scored = torch.full((len(accuracy),), 1000)
    correct = (torch.tensor(accuracy) * 1000).round().long()
    assert accept_len(correct, scored) == pytest.approx(expected, abs=1e-9)


def test_accept_len_of_a_geometric_series() -> None:
    p, k = 0.7, 7
    correct, scored = torch.full((k,), 7), torch.full((k,), 10)
    assert accept_len(correct, scored) == pytest.approx((1 - p ** (k + 1)) / (1 - p))


def test_steps_without_scored_positions_accept_nothing() -> None:
    assert accept_len(torch.tensor([5, 0]), torch.tensor([10, 0])) == pytest.approx(1.5)
