"""log-sum-exp and the gradient of cross entropy in C++ (cross_entropy.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from waypost.kernels.call import WIDE, kernels, rows_of


def log_sum_exp(logits: Tensor) -> Tensor:
    logits = rows_of(logits)
    out = torch.empty(logits.shape[0], dtype=WIDE[logits.dtype])
    kernels(logits).log_sum_exp(logits.data_ptr(), logits.stride(0), *logits.shape, out.data_ptr(), torch.get_num_threads())
    return out


def cross_entropy_gradient(logits: Tensor, lse: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    logits, targets, weights = logits.contiguous(), targets.contiguous(), weights.to(lse.dtype).contiguous()
    kernels(logits).cross_entropy_gradient(
        logits.data_ptr(), *logits.shape, lse.data_ptr(), targets.data_ptr(), weights.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return logits
