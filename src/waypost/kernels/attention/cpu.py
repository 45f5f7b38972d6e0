"""Attention over pages in C++ (forward.cpp, backward.cpp): forward for pages and for whole sequences, and our own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waypost.kernels.call import WIDE, kernels, page_stride, rows_of
from waypost.kernels.ops import PAGE_TOKENS as P


def write_pages(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    k, v = rows_of(k), rows_of(v)
    rows, groups, width = k.shape
    kernels(k).write_pages(
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_pages.data_ptr(), v_pages.data_ptr(),
        page_stride(k_pages, v_pages), slots.data_ptr(), rows, groups, width,
    )  # fmt: skip


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    return _forward(q, k_pages, v_pages, table, starts, context, scale, window, None)


def counting_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
    scale: float, window: int | None, sums: Tensor,
) -> Tensor:  # fmt: skip
    q = rows_of(q)
    heads, width = q.shape[1:]
    lse = torch.empty(q.shape[:2], dtype=WIDE[q.dtype])
    out = _forward(q, k_pages, v_pages, table, starts, context, scale, window, lse)
    kernels(q).count_attention(
        q.data_ptr(), q.stride(0), k_pages.data_ptr(), page_stride(k_pages), lse.data_ptr(), table.data_ptr(), table.shape[1],
        starts.data_ptr(), context.data_ptr(), context.shape[0], heads, k_pages.shape[1], width, scale, window or 0,
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None, context: Tensor | None = None
) -> Tensor:
    context = torch.zeros(len(starts) - 1, dtype=torch.int32) if context is None else context
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out: Tensor = _RaggedAttention.apply(q, k, v, starts, context, scale, window)
        return out
    return _over_fresh_pages(q, k, v, starts, context, scale, window, None)


def _forward(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
    scale: float, window: int | None, lse: Tensor | None,
) -> Tensor:  # fmt: skip
    q = rows_of(q)
    heads, width = q.shape[1:]
    out = torch.empty(q.shape, dtype=q.dtype)
    kernels(q).attention_forward(
        q.data_ptr(), q.stride(0), k_pages.data_ptr(), v_pages.data_ptr(), page_stride(k_pages, v_pages), table.data_ptr(),
        table.shape[1], starts.data_ptr(), context.data_ptr(), context.shape[0], heads, k_pages.shape[1], width, scale,
        window or 0, out.data_ptr(), None if lse is None else lse.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _over_fresh_pages(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, context: Tensor, scale: float, window: int | None, lse: Tensor | None
) -> Tensor:
    """The paged kernel over pages made for this call, so that training and serving run the same code."""
    table, slots, _ = page_plan(key_starts(starts, context))
    pages = int(table.max()) + 1
    k_pages, v_pages = (k.new_empty((pages, k.shape[1], *size)) for size in ((k.shape[2], P), (P, k.shape[2])))
    write_pages(k, v, k_pages, v_pages, slots)
    return _forward(q, k_pages, v_pages, table, starts, context, scale, window, lse)


def key_starts(starts: Tensor, context: Tensor) -> Tensor:
    """(S + 1,) int32: where each sequence's keys begin, its cached ones included."""
    return torch.nn.functional.pad((starts.diff() + context).cumsum(0), (1, 0)).int()


def page_plan(starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in order for whole sequences: table (S, max_pages) int32, slots (T,) int64, context (S,) int32 of zeros."""
    lengths = (starts[1:] - starts[:-1]).long()
    pages = -(-lengths // P)
    first = pages.cumsum(0) - pages
    most = int(pages.max())
    table = (first[:, None] + torch.arange(most)).clamp_(max=int(pages.sum()) - 1).int()
    row = torch.arange(int(starts[-1]))
    slots = row + (first * P - starts[:-1]).repeat_interleave(lengths)
    return table, slots, torch.zeros(len(lengths), dtype=torch.int32)


class _RaggedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, context: Tensor, scale: float, window: int | None
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        lse = torch.empty(q.shape[:2], dtype=WIDE[q.dtype])
        out = _over_fresh_pages(q, k, v, starts, context, scale, window, lse)
        ctx.save_for_backward(q, k, v, out, lse, starts, context)
        ctx.scale, ctx.window = scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, starts, context = ctx.saved_tensors
        grad_out = grad[0].contiguous()
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)  # (T, H)
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        kernels(q).attention_backward(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), grad_out.data_ptr(), lse.data_ptr(), delta.data_ptr(),
            starts.data_ptr(), context.data_ptr(), len(context), q.shape[1], k.shape[1], q.shape[2], ctx.scale,
            ctx.window or 0, *(g.data_ptr() for g in grads), torch.get_num_threads(),
        )  # fmt: skip
        return *grads, None, None, None, None
