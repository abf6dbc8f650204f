"""TTT attention against one dense softmax over everything a query may read.

The same on a GPU, where there is one: ``pytest tests/drafts``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchspec_hpc.drafts.eagle3 import flash
from torchspec_hpc.drafts.eagle3.attention import Backend, Layout, choose_backend, ttt_attention
from torchspec_hpc.drafts.eagle3.plan import StepRows

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = [7, 1, 2, 40, 11]


def layout_of(rows: Tensor, lengths: list[int], device: str = "cpu") -> Layout:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    order = rows.argsort()
    bounds = torch.searchsorted(rows[order], cu_seqlens).tolist()
    return Layout(StepRows(rows, order, bounds, cu_seqlens), rows.to(device))


def make(
    num_own: int, lengths: list[int], rows: Tensor, head_dim: int = 8, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """Queries; keys and values of block 0; those of the rows' own positions, of a row more."""
    n, r = sum(lengths), len(rows)
    generator = torch.Generator().manual_seed(0)
    shapes = [(r, 6, head_dim), (n, 2, head_dim), (n, 2, head_dim)]
    shapes += [(r + 1, 2, head_dim)] * (2 * num_own)
    made = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return tuple(x.to(device).requires_grad_() for x in made)


def run(
    tensors: tuple[Tensor, ...], layout: Layout, backend: Backend, compiled: bool = False
) -> Tensor:
    q, k, v, *own = tensors
    pairs = list(zip(own[::2], own[1::2], strict=True))
    return ttt_attention(q, (k, v), pairs, layout, backend, compiled)


def dense(tensors: tuple[Tensor, ...], rows: Tensor, lengths: list[int]) -> Tensor:
    """Every key of every block in one table, with a mask that forbids nearly all."""
    q, k, v, *own = tensors
    own = [x[: len(q)] for x in own]
    keys, values = torch.cat([k, *own[::2]]), torch.cat([v, *own[1::2]])
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(k))
    block0 = (document[rows][:, None] == document) & (index <= rows[:, None])
    blocks = [block0] + [torch.eye(len(rows), dtype=torch.bool)] * (len(own) // 2)
    heads = [x.transpose(0, 1)[None] for x in (q, keys, values)]
    mask = torch.cat(blocks, dim=1).to(q.device)
    out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


def some_rows(share: float, lengths: list[int] = LENGTHS) -> Tensor:
    """Rows of a share of the positions, in any order."""
    generator = torch.Generator().manual_seed(1)
    rows = (torch.rand(sum(lengths), generator=generator) < share).nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=generator)]


@pytest.mark.parametrize("backend", ["plain", "sdpa"])
@pytest.mark.parametrize("num_own", [0, 1, 6])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_matches_dense_attention(backend: Backend, num_own: int, share: float) -> None:
    rows = some_rows(share)
    tensors = make(num_own, LENGTHS, rows)
    output = run(tensors, layout_of(rows, LENGTHS), backend)
    expected = dense(tensors, rows, LENGTHS)
    assert output.shape == (len(rows), 48)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(a, b)


def varlen(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Scores [heads, queries, keys] by document; the last query reads the last key."""
    for i in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        k_i = k[keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("rhd,shd->hrs", q[rows], k_i) * scale
        num_rows, num_keys = scores.shape[1:]
        later = torch.ones(num_rows, num_keys, dtype=torch.bool).triu(num_keys - num_rows + 1)
        yield rows, keys, scores.masked_fill(later, -torch.inf)


def varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, *, causal):
    """As flash-attn 2.8's ``_flash_attn_varlen_forward``."""
    assert causal
    assert not dropout
    assert max_q == cu_q.diff().max()
    assert max_k == cu_k.diff().max()
    out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
    for rows, keys, scores in varlen(q, k, cu_q, cu_k, scale):
        v_i = v[keys].repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("hrs,shd->rhd", scores.softmax(-1), v_i)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse, None, "rng"


def varlen_backward(
    d_out, q, k, v, out, lse, d_q, d_k, d_v, cu_q, cu_k, max_q, max_k, dropout, scale, **options
):  # fmt: skip
    """As flash-attn 2.8's ``_flash_attn_varlen_backward``, which uses the given out and lse."""
    assert options.pop("rng_state") == "rng"
    assert options == {
        "causal": True, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "alibi_slopes": None, "deterministic": False,
    }  # fmt: skip
    group = q.shape[1] // k.shape[1]
    for rows, keys, scores in varlen(q, k, cu_q, cu_k, scale):
        p = (scores - lse[:, rows, None]).exp()
        k_i, v_i = (x[keys].repeat_interleave(group, 1) for x in (k, v))
        d_p = torch.einsum("rhd,shd->hrs", d_out[rows], v_i)
        d_s = p * (d_p - (d_out[rows] * out[rows]).sum(-1).T[..., None]) * scale
        d_q[rows] = torch.einsum("hrs,shd->rhd", d_s, k_i)
        for total, weights, x in ((d_k, d_s, q), (d_v, p, d_out)):
            added = torch.einsum("hrs,rhd->shd", weights, x[rows])
            total[keys] = added.unflatten(1, (-1, group)).sum(2)


@pytest.mark.parametrize("num_own", [0, 3])
@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("backend", ["flash", "flash_attn"])
def test_layout_for_kernels_of_gpus(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, num_own: int, share: float
) -> None:
    """Rows are where the kernels want them; stand-ins with their signatures do the arithmetic."""
    interface = types.SimpleNamespace(
        _flash_attn_varlen_forward=varlen_forward, _flash_attn_varlen_backward=varlen_backward
    )
    package = types.SimpleNamespace(flash_attn_interface=interface)
    monkeypatch.setitem(sys.modules, "flash_attn", package)

    def aten_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug):
        scale = q.shape[-1] ** -0.5
        out, lse, *_ = varlen_forward(
            q, k, v, cu_q, cu_k, max_q, max_k, dropout, scale, causal=causal
        )
        return out, lse, "rng", "unused", None

    def aten_backward(d_out, q, k, v, out, lse, cu_q, cu_k, *rest):
        max_q, max_k, dropout, causal, rng, unused = rest
        assert (rng, unused) == ("rng", "unused")
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        varlen_backward(
            d_out, q, k, v, out, lse, *gradients, cu_q, cu_k, max_q, max_k, dropout,
            q.shape[-1] ** -0.5, causal=causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=False, rng_state=rng,
        )  # fmt: skip
        return gradients

    monkeypatch.setattr(flash, "_cuda_forward", aten_forward)
    monkeypatch.setattr(flash, "_cuda_backward", aten_backward)
    rows = some_rows(share)
    tensors = make(num_own, LENGTHS, rows)
    output = run(tensors, layout_of(rows, LENGTHS), backend)
    expected = dense(tensors, rows, LENGTHS)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream)
    for a, b in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_through_the_merge_is_that_of_finite_differences() -> None:
    rows = some_rows(0.5, [3, 5])
    tensors = make(2, [3, 5], rows, head_dim=4)
    layout = layout_of(rows, [3, 5])
    assert torch.autograd.gradcheck(lambda *x: run(x, layout, "sdpa"), tensors)


def test_rows_without_any_still_tie_every_tensor_to_the_loss() -> None:
    """FSDP reduces gradients collectively: a rank without any would leave the others waiting."""
    rows = torch.arange(0)
    tensors = make(2, LENGTHS, rows)
    output = run(tensors, layout_of(rows, LENGTHS), "auto")
    for gradient in torch.autograd.grad(output.sum(), tensors):
        assert not gradient.any()


def test_softmax_is_float32_in_bfloat16() -> None:
    rows, layout = torch.arange(200), layout_of(torch.arange(200), [200])
    low = tuple(x.detach().bfloat16() for x in make(1, [200], rows))
    output = run(low, layout, "auto")
    assert output.dtype == torch.bfloat16
    expected = run(tuple(x.double() for x in low), layout, "auto")
    torch.testing.assert_close(output.double(), expected, atol=0.02, rtol=0.02)


def test_automatic_choice() -> None:
    assert choose_backend(torch.zeros(1, 1, 8)) == "sdpa"
    assert choose_backend(torch.zeros(1, 1, 8, dtype=torch.bfloat16)) == "plain"


@needs_gpu
@pytest.mark.parametrize(
    ("backend", "dtype", "compiled"),
    [
        ("flash", torch.bfloat16, False),
        ("flash", torch.bfloat16, True),
        ("flash", torch.float16, False),
        ("flex_attention", torch.bfloat16, False),
        ("flex_attention", torch.float32, False),
        ("plain", torch.float32, False),
    ],
)
@pytest.mark.parametrize("num_own", [0, 6])
@pytest.mark.parametrize("share", [0.02, 0.6, 1.0])
def test_matches_dense_attention_on_a_gpu(
    backend: Backend, dtype: torch.dtype, compiled: bool, num_own: int, share: float
) -> None:
    lengths = [300, 1, 2, 517, 130]
    rows = some_rows(share, lengths)
    tensors = make(num_own, lengths, rows, head_dim=64, device="cuda")
    low = tuple(x.detach().to(dtype).requires_grad_() for x in tensors)
    exact = tuple(x.detach().double().requires_grad_() for x in low)
    output = run(low, layout_of(rows, lengths, "cuda"), backend, compiled)
    expected = dense(exact, rows, lengths)
    assert output.dtype == dtype
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(output, low, upstream.to(dtype))
    wanted = torch.autograd.grad(expected, exact, upstream)
    # float32 products may run as TF32; of low precision the rounding of a few sums
    limit = 2e-3 if dtype == torch.float32 else 2e-2
    for a, b in zip([output, *found], [expected, *wanted], strict=True):
        error = (a.double() - b).norm() / b.norm().clamp(min=1e-9)
        assert error < limit, f"{error:.4f}"
