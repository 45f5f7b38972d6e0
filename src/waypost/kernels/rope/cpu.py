"""Rotary positions in C++ (rope.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waypost.kernels.call import kernels, rows_of


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Rope.apply(x, cos, sin)
        return out
    return _rotate(x, cos, sin, 1.0)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x = rows_of(x)
    rows, heads, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype)
    kernels(x).rope(
        x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), rows, heads, width, sign,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad[0], cos, sin, -1.0), None, None
