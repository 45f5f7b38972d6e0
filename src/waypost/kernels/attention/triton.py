"""Attention over pages for GPUs, in Triton: absolute blocks of 64 keys, one online softmax, a fixed tile of queries.

A program takes a few rows of one sequence and one key/value head. Its tile of queries has one size for prefill, chunks and
decoding, so that the compiler lays out every reduction the same way and a row keeps its bits however the rows were cut.
Values of pages past the last row of a tile are never loaded; a key that is hidden from one row of the tile but not from
another has the weight zero there.

Shapes: T rows, H query heads, G key/value heads, R = H / G, D head width, P tokens a page, S sequences.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from waypost.kernels.attention import naive
from waypost.kernels.attention.cpu import key_starts, page_plan
from waypost.kernels.call import page_stride
from waypost.kernels.ops import PAGE_TOKENS
from waypost.kernels.specified import with_gradient_of

BLOCK = 64
"""Keys that are taken into the softmax at once, as in the C++ kernels."""
QUERIES = 16
"""Queries in a tile: the fewest rows of a matrix product in Triton, so that decoding wastes least."""


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    q, k_pages, v_pages, table, items, starts, context, out, q_stride, page_stride, table_width, groups, scale, window,
    D: tl.constexpr, PADDED: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, P: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    item, g = tl.program_id(0), tl.program_id(1)
    sequence, begin, end = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    first = tl.load(context + sequence) + begin - tl.load(starts + sequence)  # position of the first row
    x, d = tl.arange(0, TILE), tl.arange(0, PADDED)
    row, head = begin + x // R, g * R + x % R
    inside = (row < end)[:, None] & (d < D)[None, :]
    position = first + x // R
    last = first + end - begin - 1
    queries = tl.load(q + row.to(tl.int64)[:, None] * q_stride + head[:, None] * D + d[None, :], mask=inside, other=0.0)

    top = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, PADDED), tl.float32)
    for start in range(tl.maximum(first - window + 1, 0) // BLOCK * BLOCK, last + 1, BLOCK):
        key = start + tl.arange(0, BLOCK)
        held = key <= last
        page = tl.load(table + sequence.to(tl.int64) * table_width + key // P, mask=held, other=0).to(tl.int64)
        at, lane = page * page_stride + g * D * P, key % P
        columns = tl.load(
            k_pages + at[None, :] + d[:, None] * P + lane[None, :], mask=(d < D)[:, None] & held[None, :], other=0.0
        )
        scores = tl.dot(queries.to(FACTOR), columns.to(FACTOR), input_precision="ieee") * scale
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # no key seen yet
        shrink, p = tl.exp(top - safe), tl.exp(scores - safe[:, None])
        rows = tl.load(v_pages + at[:, None] + lane[:, None] * D + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(p.to(rows.dtype).to(FACTOR), rows.to(FACTOR), input_precision="ieee")
        total = total * shrink + tl.sum(p, 1)
        top = new
    result = acc / tl.where(row < end, total, 1.0)[:, None]
    tl.store(
        out + (row.to(tl.int64) * groups * R + head)[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=inside
    )


def _interpreted(x: Tensor) -> bool:
    """Triton's interpreter multiplies bfloat16 as if its bits were integers; there factors are widened, which is exact."""
    return not x.is_cuda


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    if q.stride(-1) != 1 or q.stride(-2) != q.shape[-1]:
        q = q.contiguous()
    heads, width = q.shape[1:]
    groups = k_pages.shape[1]
    share = heads // groups
    tile = max(QUERIES, triton.next_power_of_2(share))
    rows, bounds = tile // share, starts.tolist()
    cut = [(s, i, min(i + rows, e)) for s, (b, e) in enumerate(itertools.pairwise(bounds)) for i in range(b, e, rows)]
    items = torch.tensor(cut, dtype=torch.int32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _attend[(len(cut), groups)](
        q, k_pages, v_pages, table, items, starts, context, out, q.stride(0), page_stride(k_pages, v_pages), table.shape[1],
        groups, scale, window if window is not None else 2**30, D=width, PADDED=max(16, triton.next_power_of_2(width)), R=share,
        TILE=tile, BLOCK=BLOCK, P=PAGE_TOKENS,
        FACTOR=tl.float32 if _interpreted(q) else getattr(tl, str(q.dtype).removeprefix("torch.")),
    )  # fmt: skip
    return out


def _ragged(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None, context: Tensor | None = None
) -> Tensor:
    """The paged kernel over pages made for this call, so that training and serving run the same code."""
    context = starts.new_zeros(len(starts) - 1) if context is None else context
    table, slots, _ = (t.to(q.device) for t in page_plan(key_starts(starts.cpu(), context.cpu())))
    pages, groups, width = int(table.max()) + 1, k.shape[1], k.shape[2]
    k_pages, v_pages = k.new_empty((pages, groups, width, PAGE_TOKENS)), v.new_empty((pages, groups, PAGE_TOKENS, width))
    naive.write_pages(k, v, k_pages, v_pages, slots)
    return paged_attention(q, k_pages, v_pages, table, starts, context.to(q.device), scale, window)


ragged_attention = with_gradient_of(naive.ragged_attention, _ragged)
