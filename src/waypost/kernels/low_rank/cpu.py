"""y + scale * (x A^T) B^T, each row by its own factors, in C++ (low_rank.cpp): one call for all rows and all factors."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels.call import kernels, rows_of
from waypost.kernels.low_rank.factors import Factors


def low_rank(x: Tensor, y: Tensor, which: Tensor, factors: Sequence[Factors]) -> Tensor:
    if x.dtype != y.dtype or which.dtype != torch.int32:
        raise ShapeError(f"rows in {x.dtype} and {y.dtype} with indices in {which.dtype}; give one dtype, and int32")
    x, out = rows_of(x), y.clone(memory_format=torch.contiguous_format)
    kernels(x).low_rank(
        x.data_ptr(), x.stride(0), x.shape[1], out.data_ptr(), out.stride(0), out.shape[1], which.data_ptr(),
        len(x), (c_void_p * len(factors))(*(each.pointer for each in factors)), torch.get_num_threads(),
    )  # fmt: skip
    return out
