"""Sum of squares of all elements in C++ (squared_norm.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from waypost.kernels.call import kernels


def squared_norm(x: Tensor) -> float:
    x = x.contiguous()
    return float(kernels(x).squared_norm(x.data_ptr(), x.numel(), torch.get_num_threads()))
