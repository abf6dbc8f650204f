"""Flash attention of some rows over all keys of their documents, with its own backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchspec_hpc.drafts.batch import upload
from torchspec_hpc.drafts.eagle3.plan import StepRows

# PyTorch's own kernels: what its public functions call, with the log-sum-exp that they hide
_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001
_cuda_forward = torch.ops.aten._flash_attention_forward  # noqa: SLF001
_cuda_backward = torch.ops.aten._flash_attention_backward  # noqa: SLF001
Gradients = tuple[Tensor, Tensor, Tensor]


class _Part(NamedTuple):
    """A run of consecutive rows against a stretch of keys, all of them or causally."""

    rows: slice  # of the sorted rows
    keys: slice
    is_causal: bool


class CpuFlash:
    """PyTorch's flash attention for CPUs, on runs of consecutive rows.

    A run at positions [a, b) of a document reads positions [0, a) in full and [a, b) causally:
    two calls, and not a score too many.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: StepRows) -> None:
        self._order, self._back = rows.order, torch.argsort(rows.order)
        self._runs = list(_runs(rows))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~torchspec_hpc.drafts.eagle3.attention.Kernel`."""
        ordered = q.index_select(0, self._order)
        out = torch.empty_like(ordered)
        lse = torch.empty(q.shape[:2], dtype=q.dtype)
        for parts in self._runs:
            rows = parts[0].rows
            results = [self._attend(ordered, k, v, part) for part in parts]
            lse[rows] = merged = torch.logsumexp(torch.stack([x for _, x in results]), 0)
            out[rows] = sum((x - merged).exp()[..., None] * o for o, x in results)
        return out.index_select(0, self._back), lse.index_select(0, self._back)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        """See :class:`~torchspec_hpc.drafts.eagle3.attention.Kernel`."""
        d_out, q, out, lse = (x.index_select(0, self._order) for x in (d_out, q, out, lse))
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part in (part for parts in self._runs for part in parts):
            found = _cpu_backward(
                *(_batched(x[part.rows]) for x in (d_out, q)),
                *(_batched(x[part.keys]) for x in (k, v)),
                _batched(out[part.rows]),
                lse[part.rows].T[None],
                0.0,
                part.is_causal,
            )
            for total, at, x in zip(
                (d_q, d_k, d_v), (part.rows, part.keys, part.keys), found, strict=True
            ):
                total[at] += x[0].transpose(0, 1)
        return d_q.index_select(0, self._back), d_k, d_v

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
        out, lse = _cpu_forward(
            _batched(q[part.rows]), *(_batched(x[part.keys]) for x in (k, v)), 0.0, part.is_causal
        )
        return out[0].transpose(0, 1), lse[0].T


def _batched(x: Tensor) -> Tensor:
    """[T, heads, head_dim] as [1, heads, T, head_dim]."""
    return x.transpose(0, 1)[None]


def _runs(rows: StepRows) -> Iterator[list[_Part]]:
    """The parts of each run of consecutive rows of one document."""
    ordered, cu_seqlens = rows.index[rows.order], rows.cu_seqlens
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered.diff() != 1
    begins[[b for b in rows.bounds if b < len(ordered)]] = True
    starts = begins.nonzero()[:, 0]
    documents = cu_seqlens[torch.searchsorted(cu_seqlens, ordered[starts], right=True) - 1]
    ends = [*starts.tolist()[1:], len(ordered)]
    for start, end, first, document in zip(
        starts.tolist(), ends, ordered[starts].tolist(), documents.tolist(), strict=True
    ):
        here = slice(start, end)
        parts = [_Part(here, slice(first, first + end - start), is_causal=True)]
        if first > document:
            parts.append(_Part(here, slice(document, first), is_causal=False))
        yield parts


class CudaFlash:
    """Flash attention 2, variable length, as PyTorch ships it for GPUs.

    The kernel lines queries up with the end of their document's keys.  So each document's queries
    run from its first row to its last token; what is no row in between is 0 and left out after.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: StepRows) -> None:
        cu_seqlens = rows.cu_seqlens
        starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
        ordered = torch.cat([rows.index[rows.order], cu_seqlens[-1:]])
        first = ordered[torch.tensor(rows.bounds[:-1])].minimum(ends)  # of each document
        lengths = ends - first  # queries of each document
        self._cu_q = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        self._cu_k = cu_seqlens
        self._num_slots = int(self._cu_q[-1])
        self._max_q, self._max_k = int(lengths.max()), int((ends - starts).max())
        document = torch.searchsorted(cu_seqlens, rows.index, right=True) - 1
        self._slots = self._cu_q[document] + rows.index - first[document]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`~torchspec_hpc.drafts.eagle3.attention.Kernel`."""
        self._to(q.device)
        out, lse = self._forward(self._spread(q), k, v)
        return out[self._slots], lse.T[self._slots]

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        """See :class:`~torchspec_hpc.drafts.eagle3.attention.Kernel`."""
        d_out, q, out, lse = (self._spread(x) for x in (d_out, q, out, lse))
        d_q, d_k, d_v = self._backward(d_out, q, k, v, out, lse.T.contiguous())
        return d_q[self._slots], d_k, d_v

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [slots, heads, head_dim], log-sum-exp [heads, slots]."""
        out, lse, *self._state, _ = _cuda_forward(q, k, v, *self._lengths(), 0.0, True, False)
        return out, lse

    def _backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        lengths = self._lengths()
        found: Gradients = _cuda_backward(
            d_out, q, k, v, out, lse, *lengths, 0.0, True, *self._state
        )
        return found

    def _spread(self, x: Tensor) -> Tensor:
        """Puts rows where the kernel wants them."""
        return x.new_zeros(self._num_slots, *x.shape[1:]).index_copy_(0, self._slots, x)

    def _lengths(self) -> tuple[Tensor, Tensor, int, int]:
        return self._cu_q, self._cu_k, self._max_q, self._max_k

    def _to(self, device: torch.device) -> None:
        self._slots = upload(self._slots, device)
        self._cu_q, self._cu_k = (upload(x.int(), device) for x in (self._cu_q, self._cu_k))


class PackageFlash(CudaFlash):
    """The same by the package flash-attn (the extra ``fa``), 2.7 or 2.8.

    Its calls are tested against the package's signatures; it has not run on a GPU yet.
    """

    def _forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from flash_attn import flash_attn_interface as package

        out, lse, _, rng_state = package._flash_attn_varlen_forward(  # noqa: SLF001
            q, k, v, *self._lengths(), 0.0, q.shape[-1] ** -0.5, causal=True
        )
        self._state = [rng_state]
        return out, lse

    def _backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Gradients:
        from flash_attn import flash_attn_interface as package

        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        package._flash_attn_varlen_backward(  # noqa: SLF001
            *(d_out, q, k, v, out, lse, d_q, d_k, d_v),
            *self._lengths(),
            0.0,
            q.shape[-1] ** -0.5,
            causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            rng_state=self._state[0],
        )
        return d_q, d_k, d_v
