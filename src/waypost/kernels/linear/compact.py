"""A weight in bfloat16 a second time, in 12 bits, for few rows: exact, and a quarter fewer bytes to wait for (compact.cpp).

Of an exponent's eight bits a trained weight uses two or three, so four are kept; the rare weight that they do not reach is
written down beside its panel. Nothing is rounded: the product's bits are those of the weight itself.

Source    Zhang et al. 2025, DFloat11, arXiv:2504.11651 (sec. 2.2: the entropy of exponents); codes of one length are our own
Shapes    T rows, K inputs, N outputs
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_long, c_void_p, cast

import torch
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels.call import kernels
from waypost.kernels.linear.cpu import PANEL, Packed

FEW_ROWS = 8
"""Rows for which it is read; with more, undoing the codes costs what the memory gives (docs/log.md, 2026-11-22)."""

GROUP = 4
"""Pairs of inputs that are coded together."""

BYTES_PER_WEIGHT = 1.5

UNCODED = 128
"""One weight in so many may have an exponent without a code, in every panel of 48 outputs."""

MOST_INPUTS = 1 << 24
"""Places in a panel are counted in 32 bits."""


class _Compact(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("share", "codes", "tops", "escapes")),
        *((name, c_long) for name in ("most", "pairs", "outputs")),
    ]


class Compact:
    """A packed weight (N, K) coded beside itself: x (T, K) -> (T, N), T <= FEW_ROWS."""

    def __init__(self, weight: Packed, codes: Tensor, tops: Tensor, escapes: Tensor) -> None:
        self.outputs, self.inputs = weight.outputs, weight.inputs
        self._kept = codes, tops, escapes
        share = cast(kernels(codes.view(torch.bfloat16)).share_compact, c_void_p)
        self._weight = _Compact(
            share, codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(), escapes.shape[1] - 1, self.inputs // 2, self.outputs
        )
        self.address = addressof(self._weight)
        """For a kernel that is in a parallel region already."""

    @staticmethod
    def of(weight: Packed) -> Compact | None:
        """None where too many of its weights have exponents that few others have."""
        count, pairs = weight.panels.shape[:2]
        if not fits(weight):
            raise ShapeError(f"a weight of {weight.inputs} inputs: see kernels/linear/compact.py fits")
        # Not on huge pages, which can take longer to get than all codes to write: the kernel asks for what it will read itself.
        codes = torch.empty((count, -(-pairs // GROUP), GROUP * 2 * PANEL * 3 // 2), dtype=torch.uint8, device="cpu")
        tops = torch.empty(count, dtype=torch.uint16, device="cpu")
        escapes = torch.empty((count, pairs * 2 * PANEL // UNCODED + 1, 2), dtype=torch.int32, device="cpu")
        failed = kernels(weight.panels).pack_compact(
            weight.panels.data_ptr(), count, pairs, codes.data_ptr(), tops.data_ptr(), escapes.data_ptr(),
            escapes.shape[1] - 1, torch.get_num_threads(),
        )  # fmt: skip
        return None if failed else Compact(weight, codes, tops, escapes)

    @property
    def num_bytes(self) -> int:
        """Of the codes."""
        return self._kept[0].nbytes

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or x.shape[1] != self.inputs or len(x) > FEW_ROWS:
            raise ShapeError(
                f"rows {tuple(x.shape)} of {x.dtype}; this weight takes up to {FEW_ROWS} of {self.inputs} in bfloat16"
            )
        x = x.contiguous()
        out = torch.empty((len(x), self.outputs), dtype=x.dtype)
        kernels(x).linear_compact(self.address, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads())
        return out


def fits(weight: Packed) -> bool:
    """Whether the kernel takes this weight."""
    return weight.inputs % 2 == 0 and weight.inputs <= MOST_INPUTS


def pays() -> bool:
    """Whether this processor undoes the codes faster than its memory brings them: with AVX-512 BW and BF16."""
    return bool(kernels(torch.empty(0, dtype=torch.bfloat16)).compact_pays())
