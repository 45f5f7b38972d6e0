"""RMSNorm in C++ (forward.cpp, backward.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waypost.kernels.call import WIDE, kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight, eps)
        return out
    return _forward(x.contiguous(), weight, eps, None)


def _forward(x: Tensor, weight: Tensor, eps: float, scale: Tensor | None) -> Tensor:
    out, width = torch.empty_like(x), x.shape[-1]
    kernels(x).rms_norm_forward(
        x.data_ptr(), weight.data_ptr(), x.numel() // width, width, eps, out.data_ptr(),
        None if scale is None else scale.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        scale = torch.empty(x.shape[:-1], dtype=WIDE[x.dtype])
        ctx.save_for_backward(x, weight, scale)
        ctx.eps = eps
        return _forward(x, weight, eps, scale)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """The output again, from what is kept for the backward pass; the same bits."""
        x, weight, _ = ctx.saved_tensors
        return _forward(x, weight, ctx.eps, None)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad_out = grad[0].contiguous()
        grad_x, grad_weight, width = torch.empty_like(x), torch.empty_like(weight), x.shape[-1]
        kernels(x).rms_norm_backward(
            x.data_ptr(), weight.data_ptr(), scale.data_ptr(), grad_out.data_ptr(), x.numel() // width, width,
            grad_x.data_ptr(), grad_weight.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_weight, None
