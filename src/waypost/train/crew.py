"""A run on several machines: each has a keeper of its own, shared by its ranks, with a share of the state.

The homes of the keepers are in the run's folder, which all machines share: keepers/10.0.0.1/, named by the machine's
address. So those that come after find the keepers of those before, whatever machines they run on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waypost.core.errors import ConfigError
from waypost.core.state import Entry, TensorSpec, whole
from waypost.keep import disk
from waypost.keep.agreement import share_out
from waypost.keep.erasure import Code, zfec
from waypost.keep.grid import Grid, share_spec
from waypost.keep.image import Image, Memory, table_of
from waypost.keep.keeper import Gone, Keeper
from waypost.keep.machines import Found
from waypost.keep.network import SECRET, Address, shared_secret
from waypost.keep.wire import alive, read_record
from waypost.train.keep_recipe import KeepRecipe
from waypost.train.parallel import World

KEEPERS = "keepers"
"""Folder in the run's: the homes of the machines' keepers, and their secret."""


@dataclass(frozen=True)
class Share:
    """What the machines hold of a state, and what their keepers must agree on."""

    specs: Sequence[TensorSpec]
    """This machine's tensors: boxes of those of the state."""
    whole: Sequence[TensorSpec]
    """The state's."""
    mine: Collection[Any]
    """((role, name), box) that this rank copies."""
    agreed: dict[str, Any]
    """See `machines.Machines`."""
    ranks: int
    """Of this machine."""
    kept: bool
    """Whether the keepers go on with what they hold: they are those of the state that was found, and all of them."""

    def entries(self, entries: Sequence[Entry]) -> list[Entry]:
        """This rank's part of the share, from its part of the state."""
        held = [e for e in entries if ((e.spec.role, e.spec.name), e.box) in self.mine]
        return [Entry(spec := share_spec(e.spec, e.box), whole(spec.shape), e.tensor) for e in held]


class Crew:
    """The machines of this run, in the order of the launcher's numbers. Every rank has one."""

    def __init__(self, hosts: Sequence[str], code: Code, copies: int, folder: Path, world: World) -> None:
        self.hosts, self.code, self.copies, self.homes, self.world = hosts, code, copies, folder / KEEPERS, world
        self.machine, self.local = int(os.environ["GROUP_RANK"]), int(os.environ["LOCAL_RANK"])
        self.home = self.homes / hosts[self.machine]

    @staticmethod
    def of(keep: KeepRecipe, folder: Path, world: World) -> Crew | None:
        """None where all ranks are on one machine, or nothing is kept in memory; ConfigError where the recipe's machines are
        not those that were started."""
        here, hosts = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)), keep.peers.hosts if keep.peers is not None else None
        if keep.memory == "off":
            return None
        if here == world.size:
            if hosts is not None:
                raise ConfigError(f"keep.peers.hosts: names {len(hosts)} machines, and all {world.size} ranks are on one; "
                                  "leave it out")  # fmt: skip
            return None
        count = len(set(world.gather(os.environ.get("GROUP_RANK"))))
        if keep.peers is None or hosts is None:
            raise ConfigError(
                f"keep.memory=on: this run is on {count} machines, whose keepers must find each other: name their addresses in "
                f"the order of their ranks, keep.peers: {{data: {count - 1}, parity: 1, hosts: [10.0.0.1, ...]}}"
            )
        if len(hosts) != count or keep.peers.data + keep.peers.parity != count:
            raise ConfigError(
                f"keep.peers: {keep.peers.data} + {keep.peers.parity} keepers on {len(hosts)} hosts, and this run is on "
                f"{count} machines; one keeper for each, e.g. data: {count - 1}, parity: 1"
            )
        zfec()
        return Crew(hosts, Code(keep.peers.data, keep.peers.parity), keep.copies, folder, world)

    def connect(self, idle_s: float) -> Keeper:
        """This machine's keeper, started by its first rank if it is not there. Collective."""
        secret = self.homes / SECRET

        def start() -> None:
            self.home.mkdir(exist_ok=True)
            if not alive(self.home):
                Keeper.start(self.home, idle_s, (self.home.name, secret)).close()

        self.world.first(self.homes, lambda: shared_secret(self.homes))
        self.world.all(self.home, lambda: start() if self.local == 0 else None)
        found: list[Keeper] = []
        self.world.all(self.home, lambda: found.append(Keeper(self.home, self.local)))
        return found[0]

    def share(self, entries: Sequence[Entry], found: Found | None) -> Share:
        """Shares the state out; `found` is where it came from, if from keepers. Collective."""
        record = read_record(self.home)["network"]
        everyone = self.world.gather((self.machine, record, [(e.spec, e.box) for e in entries]))
        tables = [table for _, _, table in everyone]
        jobs, held = share_out(tables), [[] for _ in self.hosts]  # type: list[set[Any]], list[list[TensorSpec]]
        for (machine, _, table), mine in zip(everyone, jobs, strict=True):
            held[machine] += [share_spec(spec, box) for spec, box in table if ((spec.role, spec.name), box) in mine]
        addresses = [next(record for at, record, _ in everyone if at == machine) for machine in range(len(self.hosts))]
        kept = self.world.first(self.homes, lambda: found is not None and self._kept(found, addresses, held))
        layout = self.world.first(self.homes, lambda: found.layout if kept and found is not None else disk.nonce())
        length = Grid.of(self.code, (Image.of(specs).num_bytes for specs in held)).length
        state = {(spec.role, spec.name): spec for table in tables for spec, _ in table}
        ranks = sum(machine == self.machine for machine, _, _ in everyone)
        agreed = {"index": self.machine, "addresses": addresses, "parity": self.code.parity, "length": length, "layout": layout}
        return Share(held[self.machine], list(state.values()), jobs[self.world.rank], agreed, ranks, kept)

    def _kept(self, found: Found, addresses: Sequence[Any], held: Sequence[Sequence[TensorSpec]]) -> bool:
        """Whether a state lies with the same keepers, one by one, in the same tables, in memory of the same size."""
        if found.lost or found.grid.code != self.code:
            return False
        at = [list(found.whole[machine].address) == list(address) for machine, address in enumerate(addresses)]
        return all(at) and all(
            found.whole[machine].call("part", step=found.step)["specs"] == table_of(specs)
            and found.whole[machine].call("holdings")["slots"] == self.copies
            for machine, specs in enumerate(held)
        )

    def local_memory(self, step: int) -> dict[Address, Callable[[int, memoryview], None]]:
        """The memory of this machine's keeper, where there is one of an earlier trainer that holds the step."""
        with contextlib.suppress(Gone, FileNotFoundError):
            address, keeper = read_record(self.home).get("network"), Keeper(self.home)
            tree, fds = keeper.exchange("newest", {"step": step})
            keeper.close()
            if tree["step"] is not None and address is not None:
                return {(address[0], address[1]): Memory(fds[0]).read_into}
        return {}
