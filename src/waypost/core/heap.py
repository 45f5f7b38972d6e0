"""The C heap, which keeps what was freed between blocks that live on, and the collector of Python's."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # not glibc
        return None


def trims() -> bool:
    """Whether `trim` does anything: the heap is glibc's."""
    return _malloc_trim() is not None


def trim() -> None:
    """Gives the heap's free pages back to the system, holes between live blocks included; nothing where the C library
    cannot. About 10 microseconds a megabyte of heap."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's collector, for imports, of which hardly anything is garbage: looking through what they leave, again and
    again, is a tenth of the time that PyTorch's takes. What there is at the end is left alone for good, by the pauses of a
    server too."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if running:
            gc.enable()
