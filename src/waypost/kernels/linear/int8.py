"""x W^T over weights in 8 bits with the rows in 8 bits too, but for entries that stand out: LLM.int8()'s product.

A row x is split: entries of at least `threshold` in magnitude are multiplied as they are with bfloat16(q * scale); the rest
is rounded to multiples of its largest magnitude / 127, and whole numbers are added, which is exact in any order. How a row is
split depends on the row alone. `product` is the specification, Int8Panels the compiled twin (int8.cpp); their bits are equal.

Source    Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339, sec. 3.1 and 3.2
Equation  y = s_x s_w (q_x . q_w) + sum over far entries j, ascending, of x_j bfloat16(q_wj s_w)
Shapes    T rows, K inputs, N outputs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import memory
from waypost.kernels.call import kernels
from waypost.kernels.linear.cpu import PANEL, ROW_TYPES
from waypost.kernels.linear.quantized import QuantizedWeight


@dataclass(frozen=True)
class SplitRows:
    """Rows (T, K) in two parts: codes (T, K) int8 times scale (T,) float32, and where `far` (T, K), the entries themselves."""

    codes: Tensor
    scale: Tensor
    far: Tensor
    wide: Tensor
    """The rows in float32."""


def split_rows(x: Tensor, threshold: float | None) -> SplitRows:
    """x (T, K) in two parts; with threshold None everything is rounded."""
    wide = x.float()
    far = torch.zeros_like(wide, dtype=torch.bool) if threshold is None else wide.abs() >= threshold
    near = torch.where(far, 0.0, wide)
    scale = (near.abs().amax(1) / 127.0).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.round(near / scale[:, None]).clamp_(-127, 127).to(torch.int8)
    return SplitRows(codes, scale, far, wide)


def product(x: Tensor, weight: QuantizedWeight, threshold: float | None) -> Tensor:
    """x (T, K), weight of 8 bits with one scale a row -> (T, N) in the dtype of x, whole numbers added in float64."""
    rows, scale = split_rows(x, threshold), _row_scale(weight)
    sums = (rows.codes.double() @ weight.q.double().t()).float()
    full, dense = torch.zeros_like(sums), weight.dense().float()
    for column in rows.far.any(0).nonzero()[:, 0].tolist():
        full += torch.where(rows.far[:, column], rows.wide[:, column], 0.0)[:, None] * dense[:, column]
    return (sums * rows.scale[:, None] * scale + full).to(x.dtype)


def _row_scale(weight: QuantizedWeight) -> Tensor:  # (N,)
    if weight.bits != 8 or weight.scale.shape[1] != 1:
        raise ShapeError(
            f"{weight.bits} bits with {weight.scale.shape[1]} scales a row: rows in 8 bits need weights in 8 with one"
        )
    return weight.scale[:, 0].float()


class Int8Panels:
    """A weight in the layout of the kernel: x (T, K) bfloat16 or float32 -> (T, N)."""

    def __init__(self, weight: QuantizedWeight, threshold: float | None) -> None:
        scale, q = _row_scale(weight), weight.q
        self.outputs, self.inputs = q.shape
        self.threshold = threshold
        missing, self.quads = -self.outputs % PANEL, -(-self.inputs // 4)
        q = F.pad(q, (0, 4 * self.quads - self.inputs, 0, missing))
        laid = q.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 4)).transpose(1, 2)  # (P, quads, 48, 4)
        self.panels = memory.empty(tuple(laid.shape), torch.int8).copy_(laid)
        self.offsets = 128 * q.sum(1, dtype=torch.int32)
        self.scales = F.pad(scale, (0, missing))

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype not in ROW_TYPES or x.shape[1] != self.inputs:
            raise ShapeError(f"rows {tuple(x.shape)} of {x.dtype}; this weight takes (T, {self.inputs}) in bfloat16 or float32")
        rows = split_rows(x, self.threshold)
        codes = F.pad(rows.codes, (0, 4 * self.quads - self.inputs)).view(torch.uint8) ^ 128
        begins = F.pad(rows.far.sum(1).cumsum(0), (1, 0))
        columns = rows.far.nonzero()[:, 1].to(torch.int32)
        values = rows.wide[rows.far]
        out = torch.empty((len(x), self.outputs), dtype=x.dtype)
        kernels(x).linear_int8(
            codes.data_ptr(), rows.scale.data_ptr(), begins.data_ptr(), columns.data_ptr(), values.data_ptr(),
            len(x), self.quads, self.panels.data_ptr(), self.offsets.data_ptr(), self.scales.data_ptr(), self.outputs,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out
