"""What begins before PyTorch is imported, which takes a second or two: proving a folder, packing its weights, and, once on a
machine, compiling the kernels.

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
from waypost.keep.format import natural
from waypost.kernels import build, memory
from waypost.kernels.linear import packing

if TYPE_CHECKING:
    from waypost.keep.reader import Checkpoint


_TOGETHER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""The projections of a layer as serving packs them (model/linear/fused.py), by Hugging Face's names. A model that has others is
packed when it is loaded."""


class Ahead:
    """The checkpoint at `path`: opened, and the digests of its weights proved, on a thread of its own.

    `packs` says that the compiled kernels will serve it in bfloat16 if it is stored so: they are compiled where that is still
    to be done; where it is not, the weights are packed behind the proof, into huge pages which the system fetches meanwhile
    (kernels/memory.py). The engine gives back what is over.
    """

    def __init__(self, path: str | Path, *, packs: bool = False) -> None:
        if packs:
            _prepare(Path(path))  # first: what it reserves is packed into
        executor = ThreadPoolExecutor(1, "waypost-ahead")
        self._checkpoint = executor.submit(_open, path, executor, packs)

    def checkpoint(self) -> Checkpoint:
        """The open checkpoint. CheckpointError where it cannot be opened, or a weight is damaged."""
        return self._checkpoint.result()

    def settle(self) -> None:
        """Gives back what no engine took; of what was not begun, nothing is done any more."""
        self._checkpoint.exception()  # waits: what it begins is begun
        packing.settle()


def _open(path: str | Path, executor: ThreadPoolExecutor, packs: bool) -> Checkpoint:
    from waypost.keep.reader import Checkpoint

    try:
        checkpoint = Checkpoint(path)
        checkpoint.verify_weights()
        if packs and type(checkpoint) is Checkpoint:
            with contextlib.suppress(WaypostError, OSError):  # only a head start, as _prepare
                packing.begin(executor, _products(checkpoint), checkpoint)
        return checkpoint
    finally:
        executor.shutdown(wait=False)  # what is asked of it is still done


def _products(checkpoint: Checkpoint) -> list[packing.Product]:
    """The matrices in bfloat16 that are packed together."""
    specs = {name: checkpoint.specs["weight", name] for name in checkpoint.names}
    names = {name for name, spec in specs.items() if spec.dtype == "BF16" and len(spec.shape) == 2}
    layers = sorted({name.split(".")[2] for name in names if name.startswith("model.layers.")}, key=natural)
    groups = [[f"model.layers.{layer}.{part}.weight" for part in parts] for layer in layers for parts in _TOGETHER]
    groups.append(["model.embed_tokens.weight" if checkpoint.tied else "lm_head.weight"])
    return [tuple(_lying(checkpoint, name) for name in group) for group in groups if names.issuperset(group)]


def _lying(checkpoint: Checkpoint, name: str) -> packing.Lying:
    outputs, inputs = checkpoint.specs["weight", name].shape
    return packing.Lying(checkpoint.address(name), outputs, inputs)


def _prepare(path: Path) -> None:
    """Only a head start: whatever is wrong with the folder is said by who reads it, and where the system has not the memory,
    nothing is taken from it early."""
    from waypost.keep.image import available_bytes
    from waypost.keep.places import resolve

    with contextlib.suppress(WaypostError, OSError, ValueError, OverflowError):
        num_bytes, available = packed_bytes(resolve(path)), available_bytes()
        if num_bytes > 0:
            build.begin(("pass", "logits"), "bf16", after=("greedy",))
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
