"""The likeliest token of each row without most of its logits (greedy.cpp): exact, for who asks for nothing else.

Every output is bounded by a product of whole numbers of 8 bits and by what rounding to them has lost; the few that may be the
largest are computed as the head computes them. The peer is `largest` of the whole head's logits, bit for bit.

Source    Shrivastava and Li 2014, arXiv:1405.5869 (sec. 1: the largest of inner products as a search); Cauchy-Schwarz bounds
Shapes    n rows, C hidden_size, V vocab_size
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import Structure, addressof, c_long, c_void_p, cast

import torch
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import memory
from waypost.kernels.call import kernels
from waypost.kernels.largest.cpu import largest
from waypost.kernels.linear.cpu import PANEL

MOST_INPUTS = 1 << 15
"""Products of bytes are added in 32 bits."""

REMEMBERED = 256
"""Rows over which it is remembered how many were not known."""
RETRY = 1000
"""Passes that a screen is left out before it is tried again."""


class _Screen(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("panels", "scales", "lost", "sizes", "most_lost", "most_size", "weight")),
        *((name, c_long) for name in ("outputs", "pairs")),
    ]


class Screen:
    """A head's weight (V, C) in bfloat16, rounded to 8 bits beside itself: half as much memory again."""

    def __init__(self, weight: Tensor) -> None:
        outputs, inputs = weight.shape
        if not fits(weight):
            raise ShapeError(f"a head of {tuple(weight.shape)} in {weight.dtype}: see kernels/greedy/cpu.py fits")
        self.weight = weight
        count, quads = -(-outputs // PANEL), -(-inputs // 4)
        self.panels = memory.empty((count, quads, PANEL, 4), torch.uint8)
        self._bounds = (
            *memory.empty((3, count, PANEL), torch.float32),
            *torch.empty((2, count), dtype=torch.float32, device="cpu"),
        )
        pointers = [part.data_ptr() for part in (self.panels, *self._bounds)]
        kernels(weight).pack_screen(weight.data_ptr(), outputs, inputs // 2, *pointers, torch.get_num_threads())
        self._screen = _Screen(*pointers, weight.data_ptr(), outputs, inputs // 2)
        self.address, self.function = addressof(self._screen), cast(kernels(weight).greedy, c_void_p).value
        """For a kernel that calls the screen's own."""
        self._unknown, self._refused = 0.0, 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, C) -> the largest logit (n,) in float32 and the first place (n,) that has it; place -1: that is not known,
        for too many come into question, or one is not finite."""
        if x.dtype != self.weight.dtype or x.shape[1] != self.weight.shape[1]:
            raise ShapeError(f"rows {tuple(x.shape)} of {x.dtype}; this head takes {tuple(self.weight.shape)} in bfloat16")
        x = x.contiguous()
        peaks, places = answers(len(x))
        kernels(x).greedy(x.data_ptr(), len(x), self.address, peaks.data_ptr(), places.data_ptr(), torch.get_num_threads())
        return peaks, places

    def complete(
        self, x: Tensor, peaks: Tensor, places: Tensor, unknown: int, head: Callable[[Tensor], Tensor], asked: int | None = None
    ) -> None:
        """Puts into `peaks` and `places` of x (n, C) the `unknown` that are missing, from all logits, `head` (x) (n, V), and
        remembers of how many that was: of x, or of `asked`, where passes before had rows too and knew them."""
        if unknown:
            rows = (places < 0).nonzero()[:, 0]
            peaks[rows], places[rows] = largest(head(x[rows]))
        asked = len(x) if asked is None else asked
        self._unknown += (unknown / max(1, asked) - self._unknown) * min(1.0, asked / REMEMBERED)

    @property
    def helps(self) -> bool:
        """Whether most rows were known lately: else the screen is only in the way."""
        return self._unknown < 0.5

    def left_out(self) -> None:
        """A pass went without the screen, for it did not help: after RETRY of them it may try again."""
        self._refused += 1
        if self._refused == RETRY:
            self._unknown, self._refused = 0.4, 0


def answers(rows: int) -> tuple[Tensor, Tensor]:
    """Room for what a kernel finds of so many rows: the largest logits and their places."""
    return torch.empty(rows, dtype=torch.float32, device="cpu"), torch.empty(rows, dtype=torch.int64, device="cpu")


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes this head."""
    plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and weight.shape[1] % 2 == 0 and weight.shape[1] <= MOST_INPUTS


def pays(weight: Tensor) -> bool:
    """Whether the processor multiplies bytes faster than bfloat16."""
    return bool(kernels(weight).greedy_pays())
