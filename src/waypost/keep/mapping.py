"""Memory-mapped tensors of a file: no copy, no read until a page is touched."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING

from waypost.core.errors import CheckpointError
from waypost.keep.format import Placed, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


class MappedFile:
    """One file, mapped privately: a write into a tensor of it never reaches the disk, yet is seen by later readers of
    this mapping, so its tensors are read-only by convention. The mapping lives as long as any tensor of it."""

    def __init__(self, path: Path) -> None:
        import torch

        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from error
        self._bytes: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)

    def release(self, offset: int, num_bytes: int) -> None:
        """Gives the pages of these bytes back to the system; they come back from the file when they are touched again.

        Only for bytes that nobody has written to: what was written is lost. Does nothing where the system cannot do it.
        """
        start = offset - offset % mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and num_bytes:
            self._map.madvise(mmap.MADV_DONTNEED, start, offset + num_bytes - start)

    def tensor(self, placed: Placed) -> Tensor:
        """A view of the file; a copy only where the file does not align the tensor to its items."""
        import torch

        raw, dtype = self._bytes[placed.offset : placed.offset + placed.num_bytes], torch_dtype(placed.spec.dtype)
        if placed.offset % dtype.itemsize:
            raw = raw.clone()
        if not placed.num_bytes:
            return torch.empty(placed.spec.shape, dtype=dtype)
        return raw.view(dtype).view(placed.spec.shape)
