"""When a served model's weights are coded a second time for few rows (kernels/linear/compact.py): after the passes that show
that it will pay, a few products with each pass, where memory is at hand.

Coding all products takes about what AFTER passes of few rows gain by it. So a server begins once it has run so many; one that
answers a single short question, or many at a time, never does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from waypost.core.errors import ConfigError
from waypost.core.progress import say
from waypost.keep.image import available_bytes
from waypost.kernels import build
from waypost.kernels.layers.weights import Product
from waypost.kernels.linear.compact import BYTES_PER_WEIGHT, FEW_ROWS, Compact, fits, pays
from waypost.kernels.linear.cpu import Packed

AFTER = 64
"""Passes of few rows before the first product is coded."""

AT_ONCE = 4
"""Products that are coded before a pass: about half as long as the pass itself."""

SHARE = 0.25
"""Of the memory at hand, what the codes may take at most."""


class FewRows:
    """`products`, coded in their order as passes go by; `use` (i, codes) is told of each that is."""

    def __init__(self, products: Sequence[Product], use: Callable[[int, Compact], None]) -> None:
        self._products, self._use = products, use
        self._passes, self._next = 0, 0
        if any(isinstance(p.weight, Packed) and fits(p.weight) for p in products):
            build.begin((), "bf16", after=("compact",))
        else:
            self._next = len(products)

    def saw(self, rows: int, passes: int = 1) -> None:
        """So many passes of `rows` are about to run."""
        end = len(self._products)
        if not 0 < rows <= FEW_ROWS or self._next == end:
            return
        self._passes += passes
        if self._passes < AFTER or build.pending("compact", "bf16"):
            return
        if self._next == 0 and not self._worth_it():
            self._next = end
        for i in range(self._next, min(self._next + passes * AT_ONCE, end)):
            self._next = i + 1
            try:
                codes = coded(self._products[i])
            except (RuntimeError, MemoryError) as error:  # a pass can do without them
                say(f"no more weights are coded for few rows: {error}")
                self._next = end
                return
            if codes is not None:
                self._use(i, codes)

    def _worth_it(self) -> bool:
        """Whether the processor is one for it, and the memory there."""
        weights = sum(p.weight.panels.numel() for p in self._products if isinstance(p.weight, Packed))
        available = available_bytes()
        return _pays() and (available is None or weights * BYTES_PER_WEIGHT <= SHARE * available)


@functools.cache  # and said once
def _pays() -> bool:
    try:
        return pays()
    except (ConfigError, OSError) as error:
        say(f"few rows read weights of 16 bits from now on, for the kernel of 12 is not to be had: {error}")
        return False


def coded(product: Product) -> Compact | None:
    """`product` for few rows; None where it is in few bits anyhow, or its exponents are too many."""
    return Compact.of(product.weight) if isinstance(product.weight, Packed) and fits(product.weight) else None
