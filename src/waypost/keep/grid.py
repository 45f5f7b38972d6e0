"""How the shares of several machines are coded: which machine holds which stripe, and what others give back of one.

The code, its source and its cost are in `machines`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from waypost.core.state import Box, TensorSpec
from waypost.keep import format
from waypost.keep.erasure import Code
from waypost.keep.image import Image, Key

Fetch = Callable[[int, str, int, memoryview], None]
"""(machine, "data" or "parity", byte, buffer): fills the buffer from what a machine holds."""


def share_spec(spec: TensorSpec, box: Box) -> TensorSpec:
    """A box of a tensor as a tensor of its own, as a machine's share has it."""
    return TensorSpec(f"{spec.name}@{json.dumps(box)}", spec.dtype, tuple(b - a for a, b in box), spec.role)


def holds_of(image: Image) -> dict[Key, tuple[Key, Box]]:
    """What each tensor of a share is of the state; see `Part.holds`."""
    found = {}
    for (role, name), placed in image.places.items():
        of, _, box = name.rpartition("@")
        found[role, name] = (role, of), tuple((a, b) for a, b in json.loads(box)) or ((0, 1),) * (not placed.spec.shape)
    return found


@dataclass(frozen=True)
class Grid:
    """Which machine holds which stripe of which codeword."""

    code: Code
    length: int
    """Bytes of a stripe: those of the largest share, over `data`, rounded up to a page."""

    @staticmethod
    def of(code: Code, shares: Iterable[int]) -> Grid:
        """For shares of so many bytes."""
        stripe = -(-max(shares) // code.data)
        return Grid(code, max(1, -(-stripe // format.DATA_ALIGNMENT)) * format.DATA_ALIGNMENT)

    @property
    def size(self) -> int:
        """Machines, and codewords."""
        return self.code.data + self.code.parity

    def codewords(self, machine: int) -> list[int]:
        """The codewords that hold a machine's share, stripe by stripe."""
        return [j for j in range(self.size) if (machine - j) % self.size >= self.code.parity]

    def places(self, codeword: int) -> list[tuple[int, str, int]]:
        """(machine, "data" or "parity", first byte there) of a codeword's stripes, by their number in the code."""
        data = [h for h in range(self.size) if (h - codeword) % self.size >= self.code.parity]
        parity = [((codeword + i) % self.size, "parity", i * self.length) for i in range(self.code.parity)]
        return [(h, "data", self.codewords(h).index(codeword) * self.length) for h in data] + parity

    def coded(self, machine: int, number: int, first: int, stop: int, fetch: Fetch) -> memoryview:
        """Bytes `first` to `stop` of a machine's `number`-th parity stripe, from the others' data."""
        stripes = self._fetched(self.places((machine - number) % self.size)[: self.code.data], first, stop, fetch)
        out = memoryview(bytearray(stop - first))
        self.code.encode(stripes, [out], [self.code.data + number])
        return out

    def restored(self, machine: int, offset: int, out: memoryview, fetch: Fetch, have: Callable[[int, str], bool]) -> None:
        """Fills `out` with bytes of a machine's share from `offset` on, from what other machines hold; `have(machine,
        kind)`: whether they do. CheckpointError where it is too little."""
        while out:
            stripe, first = divmod(offset, self.length)
            stop = min(first + len(out), first + format.TILE_BYTES, self.length)
            places = self.places(self.codewords(machine)[stripe])
            left = [n for n, (h, kind, _) in enumerate(places) if h != machine and have(h, kind)][: self.code.data]
            stripes = dict(zip(left, self._fetched([places[n] for n in left], first, stop, fetch), strict=True))
            whole = [memoryview(bytearray(stop - first)) for _ in range(self.code.data)]
            self.code.decode(stripes, whole)
            out[: stop - first] = whole[next(n for n, (h, _, _) in enumerate(places) if h == machine)]
            offset, out = offset + stop - first, out[stop - first :]

    @staticmethod
    def _fetched(places: Sequence[tuple[int, str, int]], first: int, stop: int, fetch: Fetch) -> list[memoryview]:
        parts = [memoryview(bytearray(stop - first)) for _ in places]
        with ThreadPoolExecutor(max(1, len(places))) as pool:
            for _ in pool.map(lambda at: fetch(at[0][0], at[0][1], at[0][2] + first, at[1]), zip(places, parts, strict=True)):
                pass
        return parts

    def determined(self, whole: set[int], spread: set[int]) -> bool:
        """Whether the machines that hold their share `whole`, and those that `spread` parity too, determine all shares."""
        held = {"data": whole, "parity": spread}
        lost = {j for machine in set(range(self.size)) - whole for j in self.codewords(machine)}
        return all(sum(h in held[kind] for h, kind, _ in self.places(j)) >= self.code.data for j in lost)
