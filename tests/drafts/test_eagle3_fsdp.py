"""The draft under FSDP2, which wraps the root module alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.drafts.cases import Case, make_case

WEIGHTS = 0.8 ** torch.arange(3)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(case: Case, param_dtype: torch.dtype) -> Case:
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    draft = copy.deepcopy(case.draft)
    fully_shard(draft, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    return Case(draft, case.tensors, case.head, case.generator)


@pytest.mark.parametrize("supervised", [0.6, 0.0])
@pytest.mark.usefixtures("process_group")
def test_same_gradients_under_fsdp(supervised: float) -> None:
    plain = make_case(pruned=True, dtype=torch.float32)
    wrapped = sharded(plain, torch.float32)
    documents = [plain.document(n, supervised=supervised) for n in (9, 2, 14)]
    documents = [(ids, mask, states.float()) for ids, mask, states in documents]
    for case in (plain, wrapped):
        case.run(documents, WEIGHTS).loss.backward()
    expected = plain.gradients()
    for name, gradient in wrapped.gradients().items():
        torch.testing.assert_close(gradient.full_tensor(), expected[name], msg=name)


@pytest.mark.usefixtures("process_group")
def test_bfloat16_products_keep_a_float32_loss() -> None:
    plain = make_case(pruned=True, dtype=torch.float32)
    wrapped = sharded(plain, torch.bfloat16)
    documents = [plain.document(n) for n in (9, 2, 14)]
    exact = plain.run([(i, m, s.float()) for i, m, s in documents], WEIGHTS)
    rounded = wrapped.run([(i, m, s.bfloat16()) for i, m, s in documents], WEIGHTS)
    assert rounded.loss.dtype == rounded.loss_sums.dtype == torch.float64
    torch.testing.assert_close(rounded.loss, exact.loss, rtol=0.02, atol=0)
    rounded.loss.backward()
    exact.loss.backward()
    expected = plain.gradients()
    for name, gradient in wrapped.gradients().items():
        full = gradient.full_tensor()
        assert full.dtype == torch.float32
        error = (full - expected[name]).norm() / expected[name].norm()
        assert error < 0.05, f"{name}: {error:.3f}"
