"""The state of one step in the memory of keepers, as the trainer that comes after reads it.

Invariant: every byte that is handed on was compared with the digest that it had when it was copied; the comparison is made
where the bytes arrive, while the caches still hold them, so that there is no pass before the reading.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.errors import CheckpointError, MemoryDamaged
from waypost.core.state import Box, Entry, TensorSpec, whole
from waypost.keep import boxes, format
from waypost.keep.filling import THREADS, as_numpy
from waypost.keep.image import Image, Key, Proof
from waypost.keep.lineage import Lineage
from waypost.keep.pieces import check_entry, raw_bytes, rows_of
from waypost.keep.wire import Gone

if TYPE_CHECKING:
    from torch import Tensor


Read = Callable[[int, memoryview], None]
"""Fills a buffer from a byte of a memory on."""


@dataclass(frozen=True)
class Part:
    """The memory of one keeper: whole tensors, or boxes of them, each laid out as a tensor of its own."""

    image: Image
    proofs: Sequence[Proof]
    reads: Callable[[], Iterable[Read]]
    """Ways to the bytes of the memory, the next where one is Gone or gives other bytes; by several threads at once."""
    holds: Mapping[Key, tuple[Key, Box]]
    """Tensor of the image -> the tensor of the state, and the box of it, that it is."""


@dataclass(frozen=True)
class _Unit:
    """What one digest covers."""

    box: Box
    """Of the tensor of the state."""
    start: int
    """First byte of the stretch of memory that holds it."""
    runs: Sequence[tuple[int, int]]
    """Bytes (start, stop) of the stretch that belong to it."""
    wants: set[str]
    """More than one digest where ranks that hold the same box copied different bytes."""
    reads: Callable[[], Iterable[Read]]

    def checked(self, stretch: memoryview, what: str) -> list[memoryview]:
        """Fills `stretch` from the memory and returns the parts of it that are the unit's; MemoryDamaged where they are not
        what was copied, or too little of it is left."""
        parts = [stretch[a:b] for a, b in self.runs]
        for read in self.reads():
            with contextlib.suppress(Gone, CheckpointError):
                read(self.start, stretch)
                hasher = format.hasher()
                for part in parts:
                    hasher.update(part)
                if self.wants == {hasher.hexdigest()}:
                    return parts
        raise MemoryDamaged(f"{what}, rows {self.box[0][0]} to {self.box[0][1]}")


class Held:
    """The state of one step in the memory of keepers; reads like a `Checkpoint`."""

    has_state = True

    def __init__(self, tree: Mapping[str, Any], specs: Iterable[TensorSpec], parts: Sequence[Part], folder: Path) -> None:
        self.step: int = tree["step"]
        self.config: dict[str, Any] = tree["config"]
        self.metrics: dict[str, Any] = tree["metrics"]
        self.tokens: int | None = tree["tokens"]
        self.scalars: dict[str, Any] = tree["scalars"]
        self.lineage: Lineage | None = Lineage.parse(tree["lineage"], f"{folder}: the keeper's snapshot")
        self.path = folder
        """The run's folder."""
        self._assets = {name: base64.b64decode(text) for name, text in tree["assets"].items()}
        self.specs: dict[Key, TensorSpec] = {(spec.role, spec.name): spec for spec in specs}
        """(role, name) -> TensorSpec."""
        self._units: dict[Key, dict[Box, _Unit]] = {}
        for part in parts:
            self._add(part)

    def __repr__(self) -> str:
        return f"Held('{self.path}', step={self.step}, tensors={len(self.specs)})"

    def _add(self, part: Part) -> None:
        for role, name, listed, want in part.proofs:
            placed, (key, origin) = part.image.places[role, name], part.holds[role, name]
            local = tuple((a, b) for a, b in listed)
            box = tuple((a + o, b + o) for (a, b), (o, _) in zip(local, origin, strict=True))
            known = self._units.setdefault(key, {}).get(box)
            if known is not None:
                known.wants.add(want)
                continue
            item = format.DTYPES[placed.spec.dtype][1]
            runs = [(at * item, (at + n) * item) for at, _, n in boxes.runs(format.as_rows(placed.spec.shape), local)]
            if runs:
                first = runs[0][0]
                spans = [(a - first, b - first) for a, b in runs]
                self._units[key][box] = _Unit(box, part.image.at(placed) + first, spans, {want}, part.reads)

    def assets(self) -> dict[str, bytes]:
        """Tokenizer, chat template and the like."""
        return dict(self._assets)

    def tensor(self, name: str, role: str = "weight") -> Tensor:
        """A copy of a whole tensor. MemoryDamaged where its memory is not what was copied into it."""
        import torch

        spec = self._spec(name, role)
        tensor = torch.empty(spec.shape, dtype=format.torch_dtype(spec.dtype))
        self.read(Entry(spec, whole(spec.shape), tensor))
        return tensor

    def read(self, entry: Entry) -> None:
        """Fills `entry.tensor` from its box; the dtype and the global shape must be the snapshot's."""
        self.read_all([entry])

    def read_all(self, entries: Iterable[Entry]) -> None:
        """`read` for many entries, several stretches at once. MemoryDamaged, naming the first tensor and its rows, where the
        memory is not what was copied into it; what was read of it must not be used then."""
        calls = [call for entry in entries for call in self._reads(entry)]
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(lambda call: call(), calls):
                pass

    def _spec(self, name: str, role: str) -> TensorSpec:
        if (role, name) not in self.specs:
            raise CheckpointError(f"{self.path}: the keeper's snapshot of step {self.step} has no {role} '{name}'")
        return self.specs[role, name]

    def _reads(self, entry: Entry) -> Iterator[Callable[[], None]]:
        """The reads that fill one entry, one for each digest that covers some of it."""
        spec, asked = self._spec(entry.spec.name, entry.spec.role), entry.spec
        if spec != asked:
            raise CheckpointError(f"{self.path}: {spec.role} '{spec.name}' is {spec.dtype} {list(spec.shape)} in the keeper's "
                                  f"snapshot, {asked.dtype} {list(asked.shape)} was asked for")  # fmt: skip
        check_entry(entry)
        box, out = entry.box or whole(format.as_rows(spec.shape)), rows_of(entry.tensor.detach())
        covered = 0
        for unit in self._units.get((spec.role, spec.name), {}).values():
            meet = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(unit.box, box, strict=True))
            if all(a < b for a, b in meet):
                covered += boxes.volume(meet)
                yield partial(_fill, unit, meet, box, out, f"{spec.role} '{spec.name}'")
        if covered != boxes.volume(box):
            raise CheckpointError(f"{self.path}: the snapshot of step {self.step} holds {covered} of {boxes.volume(box)} items "
                                  f"of {spec.role} '{spec.name}'")  # fmt: skip


def _fill(unit: _Unit, meet: Box, box: Box, out: Tensor, what: str) -> None:
    """Brings the items `meet` of a unit to their place in `out`, which covers `box`: straight there, where on both sides
    they lie in one piece and are all that the digest covers."""
    item = out.element_size()
    shift = tuple((a - o, b - o) for (a, b), (o, _) in zip(meet, box, strict=True))
    target = list(boxes.runs(tuple(out.shape), shift))
    if meet == unit.box and len(unit.runs) == len(target) == 1 and out.device.type == "cpu" and out.is_contiguous():
        at, _, count = target[0]
        unit.checked(raw_bytes(out)[at * item : (at + count) * item], what)
        return
    import numpy
    import torch

    found = unit.checked(memoryview(bytearray(unit.runs[-1][1])), what)
    shape = [b - a for a, b in unit.box]
    data = numpy.frombuffer(b"".join(found), dtype=f"u{item}")[: math.prod(shape)].reshape(shape)
    part = data[boxes.slices(tuple((a - o, b - o) for (a, b), (o, _) in zip(meet, unit.box, strict=True)))]
    into = out[boxes.slices(shift)]
    if out.device.type == "cpu":
        numpy.copyto(as_numpy(into), part)
    else:
        into.copy_(torch.from_numpy(numpy.ascontiguousarray(part)).view(out.dtype))
