"""Alignment: which predictions count, which rows a step computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.drafts.cases import make_config
from torchspec_hpc.drafts.batch import PackedBatch, pack
from torchspec_hpc.drafts.eagle3.flops import step_flops
from torchspec_hpc.drafts.eagle3.plan import TTTPlan, make_plan, scored_targets
from torchspec_hpc.drafts.eagle3.ttt import accept_len


def make_batch(*masks: list[int]) -> PackedBatch:
    """One document a mask, tokens 0, 1, 2 ... in each."""
    return pack([(torch.arange(len(m)), torch.tensor(m), torch.zeros(len(m), 2, 1)) for m in masks])


def trained(plan: TTTPlan) -> list[list[int]]:
    """The positions that each step trains."""
    return [
        sorted((plan.targets[pairs < plan.num_states] - 1 - step).tolist())
        for step, pairs in enumerate(plan.pairs)
    ]


def test_supervises_the_token_that_is_predicted() -> None:
    #                   tokens 0  1  2  3  4  5  6  7  8  9
    batch = make_batch([1, 1, 0, 0, 1, 1, 1, 0, 0, 1])
    plan = make_plan(batch, 3)
    # step i at t predicts token t+2+i: tokens 4, 5, 6 and 9 are to be learned; tokens 0 and 1
    # are too, but nothing comes before them
    assert trained(plan) == [[2, 3, 4, 7], [1, 2, 3, 6], [0, 1, 2, 5]]
    assert plan.scored.tolist() == plan.trained.tolist() == [4, 4, 4]


def test_no_target_crosses_the_end_of_a_document() -> None:
    plan = make_plan(make_batch([1, 1, 1, 1], [1], [1, 1], [1, 1, 1]), 4)
    assert trained(plan) == [[0, 1, 7], [0], [], []]


def test_a_target_outside_the_draft_vocabulary_is_scored_but_not_trained() -> None:
    batch = make_batch([1] * 6)
    assert scored_targets(batch).tolist() == [1, 2, 3, 4]
    plan = make_plan(batch, 2, torch.tensor([False, True, True, False]))
    assert trained(plan) == [[1, 2], [0, 1]]  # compared with positions 2, 3
    assert plan.scored.tolist() == [4, 3]
    assert plan.trained.tolist() == [2, 2]


@settings(max_examples=80, deadline=None)
@given(
    masks=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=4),
    ttt_length=st.integers(1, 5),
    seed=st.integers(0, 9),
    pruned=st.booleans(),
)
def test_plan_follows_the_table(
    masks: list[list[int]], ttt_length: int, seed: int, pruned: bool
) -> None:
    batch = make_batch(*masks)
    targets = scored_targets(batch)
    kept = None
    if pruned:
        kept = torch.rand(len(targets), generator=torch.Generator().manual_seed(seed)) < 0.6
    scored = [0] * ttt_length
    expected: list[list[int]] = [[] for _ in range(ttt_length)]
    start, compared = 0, set()
    allowed = set(targets.tolist() if kept is None else targets[kept].tolist())
    for mask in masks:
        for i in range(ttt_length):
            for t in range(len(mask)):
                if t + 2 + i <= len(mask) - 1 and mask[t + 2 + i]:
                    compared.add(start + t + 1 + i)
                    scored[i] += 1
                    if start + t + 1 + i in allowed:
                        expected[i].append(start + t)
        start += len(mask)
    plan = make_plan(batch, ttt_length, kept)
    # the rows of the target's head that the trainer has to compute: no more, no less
    assert set(targets.tolist()) == compared
    assert trained(plan) == expected
    assert plan.scored.tolist() == scored
    assert plan.trained.tolist() == [len(rows) for rows in expected]
    check_rows(plan, expected)


def check_rows(plan: TTTPlan, expected: list[list[int]]) -> None:
    """Each step computes what it or a later one trains, and its predictions are found there."""
    stacked = torch.cat([step.index for step in plan.steps])
    for i, step in enumerate(plan.steps):
        needed = sorted({t for later in expected[i:] for t in later})
        assert step.index[step.order].tolist() == needed
        assert torch.equal(step.index, plan.rows[: len(needed)])
        exists = plan.pairs[i] < plan.num_states
        assert torch.equal(stacked[plan.pairs[i][exists]], plan.targets[exists] - 1 - i)
        bounds = zip(step.bounds, step.bounds[1:], strict=False)
        ends = zip(step.cu_seqlens.tolist(), step.cu_seqlens.tolist()[1:], strict=False)
        for (a, b), (start, end) in zip(bounds, ends, strict=True):
            assert all(start <= t < end for t in needed[a:b])
    assert len(stacked) == plan.num_states


def test_flops_of_a_dense_document_are_those_of_the_formula() -> None:
    config = make_config(draft_vocab=25)  # H 24, q 32, kv 2 x 16, MLP 40, V 40, 2 aux layers
    plan = make_plan(make_batch([1] * 10), 2, torch.ones(8, dtype=torch.bool))
    # 8 targets; step 0 computes positions 0..7, step 1 positions 0..6
    rows, tokens, targets, predictions = 8 + 7, 10, 8, 8 + 7
    forward_backward = 6 * 24
    expected = (
        4 * tokens * 48 * 24  # fc: its input is frozen
        + forward_backward * tokens * (32 + 32)  # projections of embeddings
        + forward_backward * tokens * 32  # keys and values of block 0
        + forward_backward * (rows * 32 + 7 * 32)  # queries of all, keys and values of step 1
        + forward_backward * rows * (32 + 3 * 40)  # o_proj and MLP
        + 12 * 32 * (36 + 28)  # row t reads t + 1 keys
        + forward_backward * predictions * 25
        + 2 * 24 * targets * (25 + 40)  # distribution, and choice among all tokens
    )
    assert step_flops(config, plan) == expected


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
