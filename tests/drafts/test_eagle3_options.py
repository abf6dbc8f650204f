"""How a step is computed must not change what it computes; compared with the padded plain form."""

from __future__ import annotations

import pytest
import torch

from tests.drafts import padded_eagle3
from tests.drafts.cases import Case, Document, make_case
from torchspec_hpc.drafts.batch import pack
from torchspec_hpc.drafts.eagle3.model import ComputeOptions
from torchspec_hpc.drafts.losses import LossMix

OPTIONS = {
    "default": ComputeOptions(),
    "plain": ComputeOptions(attention_backend="plain"),
    "checkpointing": ComputeOptions(gradient_checkpointing=True),
    "chunks": ComputeOptions(loss_chunk_bytes=4 * 5 * 40 * 3),
}
WEIGHTS = 0.8 ** torch.arange(5, dtype=torch.float64)


def documents(case: Case) -> list[Document]:
    lengths = ((23, 0.5), (2, 1.0), (9, 0.0), (31, 0.9), (6, 1.0))
    return [case.document(n, supervised=share) for n, share in lengths]


def run_padded(case: Case, samples: list[Document]) -> dict[str, torch.Tensor]:
    """The gradients, with the loss among them."""
    batch = padded_eagle3.pad(samples)
    trained = padded_eagle3.trained_positions(case.draft, case.head, batch, len(WEIGHTS))
    counts = torch.stack([positions.sum() for positions in trained])
    loss, _ = padded_eagle3.loss(case.draft, case.head, batch, trained, counts, WEIGHTS)
    loss.backward()
    return {"loss": loss.detach(), **case.gradients()}


def run(case: Case, samples: list[Document]) -> dict[str, torch.Tensor]:
    output = case.run(samples, WEIGHTS)
    output.loss.backward()
    return {"loss": output.loss.detach(), **case.gradients()}


@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize("name", OPTIONS)
def test_matches_the_padded_form(name: str, pruned: bool) -> None:
    case = make_case(pruned=pruned, options=OPTIONS[name])
    # the padded form takes the softmax in float32
    found, expected = run(case, documents(case)), None
    case = make_case(pruned=pruned, options=OPTIONS[name])
    expected = run_padded(case, documents(case))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-8, msg=key)


def test_checkpointing_is_exact_to_the_bit() -> None:
    results = []
    for checkpointing in (False, True):
        options = ComputeOptions(gradient_checkpointing=checkpointing)
        case = make_case(pruned=True, dtype=torch.float32, options=options)
        samples = [(i, m, s.float()) for i, m, s in documents(case)]
        results.append(run(case, samples))
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


def test_a_frozen_head_changes_no_other_gradient() -> None:
    case = make_case(pruned=True)
    expected = run(case, documents(case))
    frozen = make_case(pruned=True)
    frozen.draft.lm_head.requires_grad_(False)
    frozen.run(documents(frozen), WEIGHTS).loss.backward()
    assert frozen.draft.lm_head.weight.grad is None
    for name, parameter in frozen.draft.named_parameters():
        if name != "lm_head.weight":
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_another_loss_reaches_the_parameters() -> None:
    mix = LossMix((("lk_lambda", 1.0),))
    case = make_case(pruned=False, options=ComputeOptions(loss=mix))
    found = run(case, documents(case))
    assert found["loss"].isfinite()
    assert not torch.allclose(
        found["fc.weight"], run(make_case(pruned=False), documents(case))["fc.weight"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pruned", [False, True], ids=["full", "pruned"])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, ComputeOptions()),
        (torch.bfloat16, ComputeOptions(compiled=True, gradient_checkpointing=True)),
        (torch.float32, ComputeOptions()),
        (torch.float32, ComputeOptions(compiled=True)),
    ],
    ids=["bf16", "bf16-compiled", "fp32", "fp32-compiled"],
)
def test_a_step_on_a_gpu(dtype: torch.dtype, options: ComputeOptions, pruned: bool) -> None:
    exact = make_case(pruned=pruned)
    expected = run(exact, documents(exact))
    case = make_case(pruned=pruned, options=options)
    batch = pack(documents(case))
    plan = case.plan(batch, len(WEIGHTS))
    case.draft.to("cuda", dtype)
    head = case.head.to("cuda", dtype).rows(case.draft.kept_ids)
    output = case.draft(
        batch.to("cuda", dtype), head, plan, plan.trained.cuda(), WEIGHTS.float().cuda()
    )
    output.loss.backward()
    limit = 1e-3 if dtype == torch.float32 else 6e-2
    found = {"loss": output.loss.detach(), **case.gradients()}
    for key, value in expected.items():
        error = (found[key].cpu().double() - value).norm() / value.norm()
        assert error < limit, f"{key}: {error:.4f}"


@pytest.mark.slow
def test_no_recompilation_as_lengths_vary() -> None:
    """Each part is compiled once for any length; evaluation and packs without rows add nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = make_case(pruned=True, dtype=torch.float32)
    case = make_case(pruned=True, dtype=torch.float32, options=ComputeOptions(compiled=True))

    def step(lengths: list[int], supervised: float = 0.7) -> None:
        samples = [plain.document(n, supervised=supervised) for n in lengths]
        samples = [(i, m, s.float()) for i, m, s in samples]
        expected, found = run(plain, samples), run(case, samples)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
        with torch.no_grad():
            measured = case.run(samples, WEIGHTS).loss
        torch.testing.assert_close(measured, expected["loss"], rtol=1e-4, atol=1e-6)

    step([9, 14])
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled
    for lengths in ([20], [7, 8, 9], [31, 5], [40], [12, 13]):
        step(lengths)
    step([1], supervised=1.0)
    step([8, 5], supervised=0.0)
    step([30, 2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
