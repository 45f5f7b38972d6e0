"""What begins before PyTorch is imported, which takes a second or two: proving a folder, finding room for its weights, and,
once on a machine, compiling the kernels.

    ahead = Ahead("path/to/folder")     # returns at once
    from waypost import Engine          # imports PyTorch meanwhile
    engine = Engine(ahead)              # what is wrong with the folder is raised here

Only what leaves the interpreter's lock alone is worth beginning here: the import holds it from end to end.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from waypost.core.errors import WaypostError
from waypost.kernels import build, memory

if TYPE_CHECKING:
    from waypost.keep.reader import Checkpoint


class Ahead:
    """The checkpoint at `path`: opened, and the digests of its weights proved, on a thread of its own.

    `packs` says that the compiled kernels will serve it in bfloat16 if it is stored so: they are compiled where that is still
    to be done, and the system fetches the huge pages into which the weights will be packed (kernels/memory.py); the engine
    gives back what is over.
    """

    def __init__(self, path: str | Path, *, packs: bool = False) -> None:
        thread = ThreadPoolExecutor(1, "waypost-ahead")
        self._checkpoint = thread.submit(_open, path)
        thread.shutdown(wait=False)
        if packs:
            _prepare(Path(path))

    def checkpoint(self) -> Checkpoint:
        """The open checkpoint. CheckpointError where it cannot be opened, or a weight is damaged."""
        return self._checkpoint.result()


def _open(path: str | Path) -> Checkpoint:
    from waypost.keep.reader import Checkpoint

    checkpoint = Checkpoint(path)
    checkpoint.verify_weights()
    return checkpoint


def _prepare(path: Path) -> None:
    """Only a head start: whatever is wrong with the folder is said by who reads it, and where the system has not the memory,
    nothing is taken from it early."""
    from waypost.keep.image import available_bytes
    from waypost.keep.places import resolve

    with contextlib.suppress(WaypostError, OSError, ValueError, OverflowError):
        num_bytes, available = packed_bytes(resolve(path)), available_bytes()
        if num_bytes > 0:
            build.begin(("pass", "logits"), "bf16", after=("greedy", "compact"))
        if num_bytes > 0 and (available is None or num_bytes <= available):
            memory.reserve(num_bytes)


def packed_bytes(folder: Path) -> int:
    """About what serving packs of the weights in `folder`, and the first strip of the cache; nothing where the weights are not
    in bfloat16 (or in few bits, which are computed in it). CheckpointError where there are none.

    Counts the files that are read and no other: a folder may hold the same weights twice, as `consolidated.safetensors` too.
    """
    from waypost.keep.format import parse_json
    from waypost.keep.places import plain_files

    config = parse_json((folder / "config.json").read_bytes(), str(folder / "config.json"))
    if "bfloat16" not in (config.get("dtype"), config.get("torch_dtype")):
        return 0
    weights = sum((folder / file).stat().st_size for file in plain_files(folder))
    return weights + memory.CACHE_STRIP_BYTES
