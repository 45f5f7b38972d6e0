"""The largest of each row in C++ (largest.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from waypost.kernels.call import WIDE, kernels, rows_of


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = rows_of(logits)
    peaks, places = torch.empty(len(logits), dtype=WIDE[logits.dtype]), torch.empty(len(logits), dtype=torch.int64)
    kernels(logits).largest(
        logits.data_ptr(), logits.stride(0), *logits.shape, peaks.data_ptr(), places.data_ptr(), torch.get_num_threads()
    )
    return peaks, places
