"""A checkpoint in memory: its files one after the other, each byte where it will lie on disk.

The layout is that of `format.place`, known before any byte is computed, so that writing a snapshot out is writing the
memory as it lies. The memory is a memfd: it has no name, is passed on as a file descriptor, and the kernel frees it
when the last process that holds it is gone, however that process ended. Nothing can be left behind in /dev/shm.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from waypost.core.errors import CapacityError, CheckpointError, ConfigError
from waypost.core.state import Box, Entry, TensorSpec, whole
from waypost.keep import boxes, disk, format
from waypost.keep.format import FilePlan, Placed
from waypost.keep.pieces import raw_bytes, row_blocks, rows_of

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[str, str]
Proof = tuple[str, str, Box, str]
"""(role, name, box, digest): what the bytes of a box were when they were copied. JSON makes lists of the tuples."""
CHECKERS = 4
"""Threads that compare memory with its proofs."""
_LOCAL = threading.local()


@dataclass(frozen=True)
class Image:
    """Where each tensor of a table lies in the memory of a snapshot."""

    plans: tuple[FilePlan, ...]
    starts: dict[str, int]
    """File -> its first byte in memory, a multiple of 4096."""
    places: dict[Key, Placed]
    """(role, name) -> place in the file."""
    num_bytes: int

    @staticmethod
    def of(specs: Iterable[TensorSpec], max_file_bytes: int = format.MAX_FILE_BYTES) -> Image:
        """The image of a table; the order of `specs` does not matter."""
        plans = tuple(format.place(specs, max_file_bytes))
        sizes = [plan.num_bytes + -plan.num_bytes % format.DATA_ALIGNMENT for plan in plans]
        starts = dict(zip((plan.path for plan in plans), itertools.accumulate([0, *sizes]), strict=False))
        places = {(p.spec.role, p.spec.name): p for plan in plans for p in plan.tensors}
        return Image(plans, starts, places, sum(sizes))

    def at(self, placed: Placed) -> int:
        """First byte of a tensor in memory."""
        return self.starts[placed.file] + placed.offset

    def itself(self) -> dict[Key, tuple[Key, Box]]:
        """What each tensor is of the state, where the image is of the whole state: itself."""
        return {key: (key, whole(format.as_rows(placed.spec.shape))) for key, placed in self.places.items()}

    def view(self, memory: Tensor, key: Key) -> Tensor:
        """A tensor of the image, as a view of `memory` (num_bytes,) uint8."""
        placed = self.places[key]
        raw = memory[self.at(placed) : self.at(placed) + placed.num_bytes]
        return raw.view(format.torch_dtype(placed.spec.dtype)).view(placed.spec.shape)


def specs_of(table: Iterable[Sequence[Any]]) -> Iterator[TensorSpec]:
    """The tensors of a table as JSON has it: [[role, name, dtype, shape], ...]."""
    return (TensorSpec(name, dtype, tuple(shape), role) for role, name, dtype, shape in table)


def table_of(specs: Iterable[TensorSpec]) -> list[list[Any]]:
    """The tensors as `specs_of` reads them, sorted."""
    return sorted([s.role, s.name, s.dtype, list(s.shape)] for s in specs)


@dataclass(frozen=True)
class Copy:
    """One piece of work: the rows of an entry that lie in one tile."""

    key: Key
    box: Box
    target: int | Tensor
    source: int | Tensor
    num_bytes: int
    owner: Tensor
    """What keeps the source's memory in its place."""

    def run(self) -> Proof:
        """Copies, with the interpreter's lock released, and digests what arrived while the caches still hold it."""
        if isinstance(self.target, int):
            ctypes.memmove(self.target, self.source, self.num_bytes)  # type: ignore[arg-type]  # both are addresses
            arrived = memoryview((ctypes.c_char * self.num_bytes).from_address(self.target)).cast("B")
        else:
            self.target.copy_(self.source)  # type: ignore[arg-type]  # both are tensors
            arrived = raw_bytes(self.target)
        return (*self.key, self.box, format.digest(arrived))


def copies(image: Image, memory: Tensor, entries: Sequence[Entry]) -> Iterator[Copy]:
    """What brings the boxes of `entries` to their place in `memory`, in the order of the files.

    CheckpointError at once where the image has no such place; the pieces themselves are made as they are asked for, because
    making those of a small model's thousand tensors takes 20 ms, which a trainer need not wait for.
    """
    ordered = sorted(entries, key=lambda entry: image.at(_place(image, entry)))
    return (copy for entry in ordered for copy in _copies(image, memory, entry))


def _place(image: Image, entry: Entry) -> Placed:
    placed = image.places.get((entry.spec.role, entry.spec.name))
    if placed is None or placed.spec != entry.spec:
        raise CheckpointError(f"{entry.spec.role} '{entry.spec.name}': the snapshots were laid out for "
                              f"{placed.spec if placed else 'no such tensor'}, not for {entry.spec}")  # fmt: skip
    return placed


def _copies(image: Image, memory: Tensor, entry: Entry) -> Iterator[Copy]:
    source, shape, key = rows_of(entry.tensor.detach()), format.as_rows(entry.spec.shape), (entry.spec.role, entry.spec.name)
    box = entry.box or whole(shape)
    if not source.numel():
        return
    target = image.view(memory, key).reshape(shape)[boxes.slices(box)]
    plain = source.device.type == "cpu" and source.is_contiguous() and box[1:] == whole(shape[1:])
    row_bytes = source[0].numel() * source.element_size()
    for rows in row_blocks(box[0], format.tile_rows(entry.spec)):
        here, size = (rows, *box[1:]), (rows[1] - rows[0]) * row_bytes
        first, stop = rows[0] - box[0][0], rows[1] - box[0][0]
        if plain:
            yield Copy(key, here, target.data_ptr() + first * row_bytes, source.data_ptr() + first * row_bytes, size, source)
        else:
            yield Copy(key, here, target[first:stop], source[first:stop], size, source)


def damage(image: Image, fd: int, proofs: Sequence[Proof]) -> str | None:
    """What in the memory behind `fd` is not what its proofs say, by tensor and rows; None where all of it is.

    Reads through the descriptor, a tile at a time, several tiles at once: nothing is mapped.
    """
    with ThreadPoolExecutor(CHECKERS) as pool:
        found = pool.map(lambda proof: _matches(image, fd, proof), proofs)
        bad = next((proof for proof, good in zip(proofs, found, strict=True) if not good), None)
    return None if bad is None else f"{bad[0]} '{bad[1]}', rows {bad[2][0][0]} to {bad[2][0][1]}"


def _matches(image: Image, fd: int, proof: Proof) -> bool:
    role, name, box, want = proof
    placed = image.places[role, name]
    item = format.DTYPES[placed.spec.dtype][1]
    runs = list(boxes.runs(format.as_rows(placed.spec.shape), tuple((a, b) for a, b in box)))
    first, stop = runs[0][0] * item, (runs[-1][0] + runs[-1][2]) * item
    data, hasher = _buffer(stop - first), format.hasher()
    read_into(fd, image.at(placed) + first, data)
    for at, _, count in runs:
        hasher.update(data[at * item - first : (at + count) * item - first])
    return bool(hasher.hexdigest() == want)


def _buffer(num_bytes: int) -> memoryview:
    """This thread's own, used again: fresh memory for every tile would cost more than reading it."""
    if len(getattr(_LOCAL, "buffer", b"")) < num_bytes:
        _LOCAL.buffer = bytearray(max(num_bytes, format.TILE_BYTES))
    return memoryview(_LOCAL.buffer)[:num_bytes]


def read(fd: int, offset: int, num_bytes: int) -> memoryview:
    """Bytes of a snapshot's memory, in a buffer of their own."""
    buffer = memoryview(bytearray(num_bytes))
    read_into(fd, offset, buffer)
    return buffer


def read_into(fd: int, offset: int, data: memoryview) -> None:
    """Fills `data` from a snapshot's memory."""
    while data:
        got = os.preadv(fd, [data], offset)
        if not got:
            raise CheckpointError(f"the snapshot's memory ends at byte {offset}, {len(data)} bytes too early")
        data, offset = data[got:], offset + got


class Memory:
    """A snapshot's memory for reading, through its descriptor; closes it at its end."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)

    def read_into(self, offset: int, data: memoryview) -> None:
        """Fills `data` from a byte on."""
        read_into(self.fd, offset, data)


def allocate(num_bytes: int) -> int:
    """A memfd of `num_bytes`; its pages are taken when they are first written, or by `occupy`."""
    if not hasattr(os, "memfd_create"):
        raise ConfigError("keeping snapshots in memory needs Linux (memfd_create); set keep.memory to off")
    fd = os.memfd_create("waypost-snapshot", os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    return fd


def taken(count: int, num_bytes: int) -> list[int]:
    """`count` memfds of `num_bytes` with all their pages; none is left open where there is no memory for all of them."""
    fds = [allocate(num_bytes) for _ in range(count)]
    try:
        for fd in fds:
            occupy(fd, num_bytes)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def occupy(fd: int, num_bytes: int) -> None:
    """Takes every page now, so that a lack of memory is an error here and not a signal in the middle of a copy."""
    available = available_bytes()
    if available is not None and num_bytes > available:
        raise CapacityError(f"a snapshot takes {disk.human(num_bytes)} of memory and {disk.human(available)} are available; "
                            "lower keep.copies, or set keep.memory to off")  # fmt: skip
    if num_bytes:
        os.posix_fallocate(fd, 0, num_bytes)


def available_bytes() -> int | None:
    """Memory that the system can give without swapping; None where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            rows = dict(line.split(":", 1) for line in stream)
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def mapped(fd: int, num_bytes: int, *, writable: bool) -> Tensor:
    """The memory behind `fd` as a tensor (num_bytes,) uint8; read-only memory is a private view. Freed with the tensor."""
    import torch

    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
    return torch.frombuffer(mmap.mmap(fd, num_bytes, access=access), dtype=torch.uint8)
