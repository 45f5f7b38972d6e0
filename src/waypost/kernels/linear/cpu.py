"""x W^T + b in C++ for weights in bfloat16 (linear.cpp), rows in bfloat16 or float32; everything else goes to PyTorch.

With float32 rows the weights are widened in registers and the arithmetic is float32 throughout (LayerCast, arXiv:2506.09501).

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import memory
from waypost.kernels.call import kernels
from waypost.kernels.linear import naive

PANEL = 48
"""Outputs that lie together in the packed layout."""

ROW_TYPES = (torch.bfloat16, torch.float32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if weight.dtype != torch.bfloat16 or x.dtype not in ROW_TYPES:
        return naive.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: Tensor = _Linear.apply(x, weight)
    else:
        out = _forward(x, weight)
    return out if bias is None else out + bias


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    """The product over the weight as it lies; a pack that nobody keeps would be a second copy of it."""
    outputs, inputs = weight.shape
    if x.shape[1] != inputs:
        raise ShapeError(f"a row has {x.shape[1]} inputs, the weight takes {inputs}")
    x, weight = _whole_pairs(x), _whole_pairs(weight)
    out = torch.empty((x.shape[0], outputs), dtype=x.dtype)
    kernels(x).linear_plain(
        x.data_ptr(), x.shape[0], x.shape[1] // 2, weight.data_ptr(), outputs, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _whole_pairs(x: Tensor) -> Tensor:
    """`x` contiguous, with a column of zeros more where their number is odd."""
    return (F.pad(x, (0, 1)) if x.shape[1] % 2 else x).contiguous()


@dataclass(frozen=True)
class Packed:
    """A weight (N, K) in panels: x (T, K), bias (N,) -> (T, N)."""

    panels: Tensor
    outputs: int
    inputs: int

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.shape[1] != self.inputs:
            raise ShapeError(f"a row has {x.shape[1]} inputs, the weight takes {self.inputs}")
        x = _whole_pairs(x)
        out = torch.empty((x.shape[0], self.outputs), dtype=x.dtype)
        kernels(x).linear(
            x.data_ptr(), x.shape[0], self.panels.shape[1], self.panels.data_ptr(), self.outputs,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out if bias is None else out + bias


def pack(*weights: Tensor) -> Packed:
    """Weights (N_i, K) bfloat16 of one input, one below the other, in panels: a copy of their size."""
    if any(len(weight) % PANEL for weight in weights[:-1]):  # a panel would hold the end of one and the beginning of the next
        weights = (torch.cat(weights),)
    inputs, outputs = weights[0].shape[1], sum(map(len, weights))
    panels = memory.empty((-(-outputs // PANEL), -(-inputs // 2), PANEL, 2), torch.bfloat16)
    parts = panels.split([-(-len(weight) // PANEL) for weight in weights])
    for weight, part in zip(map(_whole_pairs, weights), parts, strict=True):
        kernels(weight).pack_panels(weight.data_ptr(), len(weight), part.shape[1], part.data_ptr(), torch.get_num_threads())
    return Packed(panels, outputs, inputs)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = grad[0] @ weight.to(x.dtype) if needs_x else None
        grad_weight = (grad[0].t() @ x).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight
