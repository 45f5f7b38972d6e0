"""What a process takes beside the tensors that are counted: the interpreter with its libraries, and the holes of its heap.

Holes. PyTorch asks the C library for blocks at multiples of 64 bytes. glibc cuts such a block out of a larger one and keeps
the scraps, at most 96 bytes, apart, for small objects. So a freed block is a few bytes too short for an equal one, and while
it is not joined with a free neighbour it serves smaller ones alone. Of what passes through the heap in a step, about half is
left behind in this way: 0.3 to 0.9 over nine settings of 3 and 29 million parameters. With the scraps joined at once
(GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0) 29 million parameters under recomputation took 1,016 MB
instead of 1,323. Blocks above 32 MB are mapped by themselves and leave nothing.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from waypost.core.heap import trim, trims
from waypost.train.accounting import peak_rss_bytes

HOLES = 0.5
"""Bytes that stay behind in glibc's heap, for each that passes through it in a micro-batch."""

MAPPED_BYTES = 1 << 25
"""Blocks of so many bytes never come from glibc's heap (its DEFAULT_MMAP_THRESHOLD_MAX, on 64 bits)."""


def resident_bytes() -> tuple[int, int]:
    """(bytes of this process now that are its own, bytes of files that it has mapped), once the heap's holes are given back.
    Where the system does not tell them (it is not Linux), the most that the process has held, and 0."""
    trim()
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split())
    except OSError:
        return peak_rss_bytes(), 0
    return (resident - shared) * mmap.PAGESIZE, shared * mmap.PAGESIZE


def hole_bytes(passing: float, largest: float) -> int:
    """Holes that `passing` bytes of tensors leave, each of about `largest` bytes; 0 where the heap is not glibc's."""
    return int(HOLES * passing) if trims() and largest < MAPPED_BYTES else 0
