"""Memory for weights that every step reads from end to end: on huge pages, where the system gives them on request.

A pass over weights in pages of 4 KB waits for address translation, and the processor's prefetching ends at every page: one
thread read 16 GB/s of them and 27 GB/s of huge ones (x86-64; bench.roofline measures the machine at hand). Huge pages are
dear to get: the system zeroes them, and where its memory is in pieces it first moves others together, up to 2 ms a page. So
`reserve`, which needs no PyTorch, fetches them on a thread of its own while the interpreter imports it.

Invariant: bytes of a block below `at` belong to tensors and claims, bytes from `at` on are zero and belong to nobody.
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
from dataclasses import dataclass
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

    def take(self, num_bytes: int) -> Claim:
        """The next `num_bytes`; they must be there."""
        begin, self.at = self.at, self.at + num_bytes
        return Claim(self, begin, num_bytes)

    def discard(self, begin: int, end: int) -> None:
        """Gives the system's pages between them back, those that lie there whole; the memory is zero afterwards."""
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and begin < end:
            self.buffer.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(frozen=True)
class Claim:
    """A part of a block that belongs to somebody, who need not have PyTorch yet."""

    _block: _Block
    _begin: int
    num_bytes: int

    @property
    def address(self) -> int:
        return self._block.address + self._begin

    def tensor(self) -> Tensor:
        """(num_bytes,) uint8."""
        import torch

        return torch.frombuffer(self._block.buffer, dtype=torch.uint8, count=self.num_bytes, offset=self._begin)

    def part(self, begin: int, num_bytes: int) -> Claim:
        """`num_bytes` of it, from its byte `begin` on."""
        return Claim(self._block, self._begin + begin, num_bytes)

    def give_back(self) -> None:
        """Says that nobody needs it."""
        self._block.discard(self._begin, self._begin + self.num_bytes)


_lock = threading.Lock()
_slab: _Block | None = None  # the newest
_reserved: _Block | None = None  # what `reserve` made last


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
    return own.tensor()[:num_bytes].view(dtype).view(*shape)


def claim(num_bytes: int) -> Claim | None:
    """The next `num_bytes` of what was reserved; None where nothing was, or not so much is left."""
    rounded = -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES
    with _lock:
        if _slab is None or _slab is not _reserved or rounded > _slab.end - _slab.at:
            return None
        return _slab.take(rounded)


def reserve(num_bytes: int) -> threading.Thread:
    """Lets the next `empty` share one block of `num_bytes`, whose pages a thread fetches meanwhile; `settle` ends that.

    The block lives as long as any tensor of it: for weights that go together.
    """
    global _slab, _reserved
    with _lock:
        _slab = _reserved = block = _Block(num_bytes)
    thread = threading.Thread(target=_fetch, args=(block,), name="waypost-pages", daemon=True)
    thread.start()
    return thread


def _fetch(block: _Block) -> None:
    """Has the system give the pages of `block` as long as it is the one that is handed out, whoever writes to them by then."""
    while True:
        with _lock:
            begin, end = block.fetched, min(block.fetched + FETCH_BYTES, block.end)
            if block is not _slab or begin >= end:
                return
            block.fetched = end
        if not _populate(block.address + begin, end - begin):
            with _lock:  # an older system: zeros where nobody has been, and `empty` waits for one fetch at most
                free = max(begin, min(block.at, end))
                ctypes.memset(block.address + free, 0, end - free)
        with _lock:
            if block is not _slab:  # was given back meanwhile
                block.discard(max(begin, block.at), end)
        time.sleep(PAUSE_S)


def _populate(address: int, num_bytes: int) -> bool:
    """Whether the system could fetch its pages as if they had been written to; what they hold stays."""
    function = _madvise()
    return function is not None and function(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), POPULATE_WRITE) == 0


def populate(part: Tensor) -> None:
    """Fetches the system's pages of `part` (contiguous) as if it had been written to; what it holds stays. Nothing happens
    where the system cannot (Linux before 5.14). Other threads run meanwhile."""
    begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    if part.numel():
        _populate(begin, part.data_ptr() + part.nbytes - begin)


@functools.cache
def _madvise() -> Callable[..., int] | None:
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None


def settle() -> None:
    """Gives back what was reserved and not taken."""
    global _slab, _reserved
    with _lock:
        block, _slab, _reserved = _slab, None, None
        if block is not None:
            block.discard(block.at, len(block.buffer))
