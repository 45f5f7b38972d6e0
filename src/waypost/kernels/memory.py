"""Memory for weights that every step reads from end to end: on huge pages, where the system gives them on request.

A pass over weights in pages of 4 KB waits for address translation, and the processor's prefetching ends at every page: one
thread read 16 GB/s of them and 27 GB/s of huge ones (x86-64; bench.roofline measures the machine at hand). Huge pages are
dear to get: the system zeroes them, and where its memory is in pieces it first moves others together, up to 2 ms a page. So
`reserve`, which needs no PyTorch, fetches them on a thread of its own while the interpreter imports it.

Invariant: bytes of a block below `at` belong to tensors, bytes from `at` on are zero and belong to nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HUGE_PAGE_BYTES = 1 << 21

SLAB_BYTES = 1 << 25
"""Tensors share slabs of this size: most weights are smaller than a few huge pages. A slab lives as long as any of them."""

ALIGN_BYTES = 64

CACHE_STRIP_BYTES = 12 * HUGE_PAGE_BYTES
"""Of the cache of keys and values, fetched at a time, before it is used: so much at least (serve/pages.py)."""

FETCH_BYTES = 8 * HUGE_PAGE_BYTES
"""Fetched ahead at once: the thread then asks for the interpreter's lock a few times, not a few hundred."""

POPULATE_WRITE = 23
"""Of Linux's madvise; Python's mmap has no name for it."""

PAUSE_S = 1e-4
"""After each fetch: time for `empty` to get its turn."""


class _Block:
    """Zeroed memory that begins at a multiple of a huge page and is handed out from its beginning on."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: the memory is as good, only slower
                self.buffer.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.at = -self.address % HUGE_PAGE_BYTES
        self.end = self.at + num_bytes
        self.fetched = self.at

    def take(self, num_bytes: int) -> Tensor:
        """The next `num_bytes`, as uint8; they must be there."""
        import torch

        begin, self.at = self.at, self.at + num_bytes
        return torch.frombuffer(self.buffer, dtype=torch.uint8, count=num_bytes, offset=begin)


_lock = threading.Lock()
_slab: _Block | None = None  # the newest


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like torch.empty, on huge pages if possible. Not for small or short-lived tensors."""
    global _slab
    num_bytes = math.prod(shape) * dtype.itemsize
    rounded = max(-(-num_bytes // ALIGN_BYTES), 1) * ALIGN_BYTES
    with _lock:
        block = _slab
        if block is None or rounded > block.end - block.at:
            block = _Block(max(rounded, SLAB_BYTES))
            if rounded <= SLAB_BYTES // 2:
                _slab = block
        own = block.take(rounded)
    return own[:num_bytes].view(dtype).view(*shape)


def reserve(num_bytes: int) -> threading.Thread:
    """Lets the next `empty` share one block of `num_bytes`, whose pages a thread fetches meanwhile; `settle` ends that.

    The block lives as long as any tensor of it: for weights that go together.
    """
    global _slab
    with _lock:
        _slab = block = _Block(num_bytes)
    thread = threading.Thread(target=_fetch, args=(block,), name="waypost-pages", daemon=True)
    thread.start()
    return thread


def _fetch(block: _Block) -> None:
    """Writes zeros where nobody has been, as long as `block` is the one that is handed out."""
    while True:
        with _lock:  # against `empty`, which waits for one fetch at most
            begin = max(block.at, block.fetched)
            end = min(begin + FETCH_BYTES, block.end)
            if block is not _slab or begin >= end:
                return
            ctypes.memset(block.address + begin, 0, end - begin)
            block.fetched = end
        time.sleep(PAUSE_S)


def populate(part: Tensor) -> None:
    """Fetches the system's pages of `part` (contiguous) as if it had been written to; what it holds stays. Nothing happens
    where the system cannot (Linux before 5.14). Other threads run meanwhile."""
    begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    function = _madvise()
    if function is not None and part.numel():
        function(ctypes.c_void_p(begin), ctypes.c_size_t(part.data_ptr() + part.nbytes - begin), POPULATE_WRITE)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None


def settle() -> None:
    """Gives back what was reserved and not taken."""
    global _slab
    with _lock:
        block, _slab = _slab, None
        if block is not None and hasattr(mmap, "MADV_DONTNEED"):
            begin = -(-block.at // mmap.PAGESIZE) * mmap.PAGESIZE
            block.buffer.madvise(mmap.MADV_DONTNEED, begin, len(block.buffer) - begin)
