"""Snapshots of a run on several machines: each machine's keeper holds a share of the state, and parity of the others'.

Source    Patterson, Gibson and Katz 1988, A Case for Redundant Arrays of Inexpensive Disks, SIGMOD, level 5: parity goes
          round. The code is that of `erasure`; between snapshot keepers: REFT, 2023, arXiv:2310.12670
Ours      H = data + parity machines; a machine's share is cut into `data` stripes. Codeword j (0 to H - 1) has its parity on
          the machines j, j + 1, ... j + parity - 1 (modulo H) and one stripe of every other machine's share. Keepers fetch
          what they code, so that all that one of them answers is reading
Cost      1 + parity / data times the share, twice each (two snapshots); parity times the share over the network, in and out

Invariant: no machine begins a step before every machine holds the one before whole, with its parity. So at every moment
they have one step in common, of which any `parity` machines may be lost. It is the trainer's ranks, in step anyway, that
keep it (see `train.keeping`).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from waypost.core.errors import CheckpointError
from waypost.keep import format
from waypost.keep.erasure import Code
from waypost.keep.grid import Grid, holds_of
from waypost.keep.held import Held, Part, Read
from waypost.keep.image import Image, read_into, specs_of, taken
from waypost.keep.network import Address, Caller
from waypost.keep.wire import Gone


class Machines:
    """A keeper's side of the others: fetches what its parity is made of, and holds it for two steps."""

    lost = 0
    """None is made up for while training: the next step that one of them misses ends the spreading."""

    def __init__(self, agreed: Mapping[str, Any], secret: bytes) -> None:
        """`agreed` is what all machines were told: {"index", "addresses", "parity", "length", "layout"}."""
        self.agreed, self._secret = dict(agreed), secret
        self.index: int = agreed["index"]
        self.addresses: list[Address] = [(host, port) for host, port in agreed["addresses"]]
        self.code = Code(len(self.addresses) - agreed["parity"], agreed["parity"])
        self.grid = Grid(self.code, agreed["length"])
        self._fds = taken(2, self.code.parity * self.grid.length)
        self._callers: dict[int, Caller] = {}
        self.held: dict[int, tuple[int, dict[str, Any]]] = {}
        """Step -> (descriptor of its parity, the other machines' tables and proofs by number)."""

    def put(self, step: int, fd: int, facts: Mapping[str, Any]) -> None:
        """Codes this machine's parity of `step`, once the others hold it whole. Gone or CheckpointError where one does
        not."""
        if step not in self.held and len(self.held) == len(self._fds):
            del self.held[min(self.held)]
        self.held.pop(step, None)
        memory = next(fd for fd in self._fds if all(fd != used for used, _ in self.held.values()))
        others = [h for h in range(self.grid.size) if h != self.index]
        parts = {str(h): dict(self._ask(h, "part", step=step)) for h in others}

        def fetch(machine: int, kind: str, offset: int, out: memoryview) -> None:
            self._ask(machine, "piece", out, step=step, kind=kind, offset=offset, size=len(out))

        for number in range(self.code.parity):
            for first in range(0, self.grid.length, format.TILE_BYTES):
                stop = min(first + format.TILE_BYTES, self.grid.length)
                os.pwrite(memory, self.grid.coded(self.index, number, first, stop, fetch), number * self.grid.length + first)
        self.held[step] = memory, parts

    def _ask(self, machine: int, name: str, into: memoryview | None = None, **fields: Any) -> Mapping[str, Any]:
        """A call of another machine. A connection that broke is forgotten: the machine may answer again."""
        if machine not in self._callers:
            self._callers[machine] = Caller(self.addresses[machine], self._secret)
        try:
            return self._callers[machine].call(name, into, **fields)
        except Gone:
            self._callers.pop(machine, None)
            raise

    def read(self, step: int, offset: int, out: memoryview) -> None:
        """Bytes of the parity of a step."""
        if step not in self.held:
            raise CheckpointError(f"no parity of step {step} here; there is of {sorted(self.held)}")
        read_into(self.held[step][0], offset, out)

    def rewind(self, step: int) -> None:
        """Forgets the parity of steps after `step`."""
        self.held = {kept: held for kept, held in self.held.items() if kept <= step}

    def finish(self) -> None:
        """The others end by themselves."""

    def close(self) -> None:
        """Gives the parity up."""
        for caller in self._callers.values():
            caller.close()
        for fd in self._fds:
            os.close(fd)


@dataclass(frozen=True)
class Found:
    """A step that the keepers of several machines determine."""

    step: int
    layout: str
    grid: Grid
    whole: Mapping[int, Caller]
    """Machines that hold their share."""
    spread: Mapping[int, Caller]
    """Machines that hold their parity."""

    @property
    def lost(self) -> int:
        return self.grid.size - len(self.whole)

    def held(self, folder: Path, local: Mapping[Address, Callable[[int, memoryview], None]]) -> Held:
        """The state, read from the machines as it is asked for; `local` is the memory of those that are this one."""
        tree = next(iter(self.whole.values())).call("facts", step=self.step)
        known: dict[int, Mapping[str, Any]] = {h: caller.call("part", step=self.step) for h, caller in self.whole.items()}
        for caller in self.spread.values() if self.lost else ():
            known = {**{int(h): part for h, part in caller.call("others", step=self.step)["parts"].items()}, **known}
        parts = [self._part(machine, known[machine], local) for machine in range(self.grid.size)]
        return Held(tree, specs_of(tree["whole"]), parts, folder)

    def _part(self, machine: int, known: Mapping[str, Any], local: Mapping[Address, Any]) -> Part:
        image = Image.of(specs_of(known["specs"]))

        def fetch(h: int, kind: str, offset: int, out: memoryview) -> None:
            (self.whole if kind == "data" else self.spread)[h].call(
                "piece", out, step=self.step, kind=kind, offset=offset, size=len(out)
            )

        def have(h: int, kind: str, without: Collection[int]) -> bool:
            return h not in without and h in (self.whole if kind == "data" else self.spread)

        def reads() -> Iterator[Read]:
            if machine in self.whole:
                here = local.get(self.whole[machine].address)
                yield here or (lambda offset, out: fetch(machine, "data", offset, out))
            for without in self._left_out(machine):
                yield partial(self.grid.restored, machine, fetch=fetch, have=partial(have, without=without))

        return Part(image, known["proofs"], reads, holds_of(image))

    def _left_out(self, machine: int) -> Iterator[tuple[int, ...]]:
        """The sets of other machines that a share can be restored without, the smallest first: what one of them gives may be
        damaged too, and only the share's digests tell."""
        others = [h for h in range(self.grid.size) if h != machine]
        spare = self.grid.code.parity - 1 - sum(h not in self.whole for h in others)
        return itertools.chain.from_iterable(itertools.combinations(others, count) for count in range(max(0, spare) + 1))


def find(addresses: Iterable[Address], secret: bytes, skip: Collection[int] = ()) -> tuple[Found | None, list[str]]:
    """The newest step, none of `skip`, that the keepers at `addresses` determine, and why others are not among them."""
    groups: dict[str, dict[int, tuple[Caller, Mapping[str, Any]]]] = {}
    causes = []
    for address in addresses:
        try:
            caller = Caller(address, secret)
            said = caller.call("holdings")
        except (Gone, CheckpointError) as error:
            causes.append(str(error))
            continue
        if said["layout"] is not None:
            groups.setdefault(said["layout"], {})[said["index"]] = caller, said
    best: Found | None = None
    for layout, group in groups.items():
        said = next(iter(group.values()))[1]
        grid = Grid(Code(said["data"], said["parity"]), said["length"])
        for step in {step for _, holds in group.values() for step in holds["steps"]} - set(skip):
            whole = {h: caller for h, (caller, holds) in group.items() if step in holds["steps"]}
            spread = {h: caller for h, (caller, holds) in group.items() if step in holds["spread"]}
            if grid.determined(set(whole), set(spread)) and (best is None or step > best.step):
                best = Found(step, layout, grid, whole, spread)
    return best, causes
