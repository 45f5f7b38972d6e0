"""The best that this machine gives at the moment, under the current number of threads: PyTorch or our own kernels, whichever
is faster. Short enough to be measured in turn with what is compared with it: on a shared host the memory's rate halves and
doubles within minutes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from waypost.kernels.linear.cpu import Packed


@dataclass(frozen=True)
class Peaks:
    """What the machine gives at best, a second."""

    flops: float
    """Of a product in bfloat16."""
    read_bytes: float
    """Read from memory."""

    @staticmethod
    def best(found: Sequence[Peaks]) -> Peaks:
        """The best of each."""
        return Peaks(max(each.flops for each in found), max(each.read_bytes for each in found))


def measure(repeats: int = 5) -> Peaks:
    """Both, now; a fifth of a second for each 4 repeats."""
    return Peaks(product_flops(repeats), read_bandwidth(repeats))


def product_flops(repeats: int = 5) -> float:
    """FLOP/s of a product in bfloat16: of 1024 x 1024 by PyTorch, or our own of 256 rows whose weights stay in the cache."""
    import torch

    from waypost.kernels.linear.cpu import pack
    from waypost.measure.machine import best_seconds, matmul_flops

    inputs, outputs, rows = 1536, 192, 256
    x, packed = torch.ones(rows, inputs, dtype=torch.bfloat16), pack(torch.ones(outputs, inputs, dtype=torch.bfloat16))
    own = 2.0 * rows * inputs * outputs / best_seconds(lambda: packed(x), repeats)
    return max(own, matmul_flops(torch.bfloat16, repeats=repeats))


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes/s read from memory that no cache holds, on huge pages: by a maximum of PyTorch, or our own product of one row."""
    import torch

    from waypost.measure import machine

    packed = _large()
    x = torch.ones(1, packed.inputs, dtype=torch.bfloat16)
    own = packed.panels.nbytes / machine.best_seconds(lambda: packed(x), repeats)
    return max(own, machine.read_bandwidth(repeats=repeats))


@functools.cache
def _large() -> Packed:
    """268 MB of weights."""
    import torch

    from waypost.kernels.linear.cpu import pack

    return pack(torch.ones(48 * 1365, 2048, dtype=torch.bfloat16))
