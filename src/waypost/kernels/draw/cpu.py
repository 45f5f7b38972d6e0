"""A token from each row of logits in C++ (draw.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels.call import WIDE, kernels, rows_of


def draw(logits: Tensor, rows: Sequence[int], edited: Sequence[Tensor | None], wishes: Tensor) -> tuple[Tensor, Tensor]:
    run = kernels(logits).draw
    logits, count, width = rows_of(logits), len(rows), logits.shape[1]
    if rows and not 0 <= min(rows) <= max(rows) < len(logits):
        raise ShapeError(f"rows {min(rows)} to {max(rows)} of {len(logits)} rows of logits")
    own = [None if row is None else row.to(WIDE[logits.dtype]).contiguous() for row in edited]
    if wishes.shape != (count, 5) or len(own) != count or any(row is not None and row.shape != (width,) for row in own):
        raise ShapeError(f"{count} rows of {width} logits: wishes {tuple(wishes.shape)}, {len(own)} edited rows or None")
    begin, step = logits.data_ptr(), logits.stride(0) * logits.element_size()
    plain = torch.tensor([begin + step * row if mine is None else 0 for row, mine in zip(rows, own, strict=True)])
    wide = torch.tensor([0 if row is None else row.data_ptr() for row in own])
    wishes = wishes.to(torch.float64).contiguous()
    tokens, shares = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    pointers = (t.data_ptr() for t in (plain, wide, wishes, tokens, shares))
    run(*pointers, count, width, torch.get_num_threads())
    return tokens, shares
