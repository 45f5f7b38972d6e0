"""Trying whether the bits of a row of a product depend on the rows beside it.

A difference may be rare: one row at a time has given other bits in one output of five thousand, on one shape of five. So
the trial compares many outputs of the weight that will be used, not a few of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from waypost.core import rng
from waypost.kernels.ops import ROW_TILE

TRIAL_OUTPUTS = 1 << 18
"""Outputs that a trial computes for each row count, about."""


def trial_input(inputs: int, outputs: int, dtype: torch.dtype) -> Tensor:
    """(T, K) normal numbers at several scales; T a multiple of 2 * ROW_TILE that makes about TRIAL_OUTPUTS outputs."""
    tiles = min(max(TRIAL_OUTPUTS // (outputs * 2 * ROW_TILE), 1), 4)
    source = rng.generator(0, "rows")
    x = torch.randn(2 * ROW_TILE * tiles, inputs, generator=source)
    return (x * 4.0 * torch.rand(len(x), 1, generator=source)).to(dtype)


def differing_count(product: Callable[[Tensor], Tensor], x: Tensor, want: Tensor, counts: Iterable[int]) -> int | None:
    """The first of `counts` for which `product`, given x (T, K) so many rows at a time, has other bits than want (T, N): those
    of all rows, or of as many as have TRIAL_OUTPUTS outputs, which are two parts at least, and a rest of two rows."""
    enough = -(-TRIAL_OUTPUTS // max(1, want.shape[1]))
    for count in counts:
        num_rows = max(2, -(-enough // count)) * count + 2
        parts = zip(x[:num_rows].split(count), want[:num_rows].split(count))
        if any(not torch.equal(product(part), rows) for part, rows in parts):
            return count
    return None
