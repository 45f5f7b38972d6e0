"""silu(gate) * up in C++ (swiglu.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waypost.kernels.call import kernels, rows_of


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out: Tensor = _Swiglu.apply(gate, up)
        return out
    return _forward(rows_of(gate), rows_of(up))


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype)
    kernels(gate).swiglu_forward(
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), *gate.shape, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = rows_of(gate), rows_of(up)
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def recompute(ctx: Any) -> Tensor:
        """The output again, from what is kept for the backward pass; the same bits."""
        return _forward(*ctx.saved_tensors)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_out = grad[0].contiguous()
        grad_gate, grad_up = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
        kernels(gate).swiglu_backward(
            gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), grad_out.data_ptr(),
            *gate.shape, grad_gate.data_ptr(), grad_up.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return grad_gate, grad_up
