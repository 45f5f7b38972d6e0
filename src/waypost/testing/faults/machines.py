"""Faults of a run on several machines, which addresses of the loopback stand for: their keepers lost, one after another."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from waypost.core.errors import MemoryDamaged
from waypost.core.state import Entry, whole
from waypost.keep.agreement import share_out
from waypost.keep.erasure import Code
from waypost.keep.grid import Grid, share_spec
from waypost.keep.image import Image, copies
from waypost.keep.keeper import Keeper, Terms
from waypost.keep.machines import find
from waypost.keep.network import SECRET, shared_secret
from waypost.keep.wire import alive, read_record
from waypost.testing.faults import state

WAIT_S = 30.0
SIZE, PARITY = 4, 2
STEPS = (1, 2)


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline, f"nothing happened in {WAIT_S:.0f} s"
        time.sleep(0.002)


class Machines:
    """Keepers of `SIZE` machines, and what their trainers do with them."""

    def __init__(self, folder: Path) -> None:
        self.homes = [folder / f"127.0.0.{2 + number}" for number in range(SIZE)]
        self.secret = shared_secret(folder)
        for home in self.homes:
            home.mkdir()
            Keeper.start(home, 60.0, (home.name, folder / SECRET)).close()
        self.addresses = [(host, port) for host, port in (read_record(home)["network"] for home in self.homes)]
        self.keepers = [Keeper(home) for home in self.homes]
        tables = [state.entries(0, machine, SIZE) for machine in range(SIZE)]
        self.jobs = share_out([[(entry.spec, entry.box) for entry in table] for table in tables])
        shares = [[entry.spec for entry in self._share(0, machine)] for machine in range(SIZE)]
        length = Grid.of(Code(SIZE - PARITY, PARITY), (Image.of(specs).num_bytes for specs in shares)).length
        agreed = {"addresses": [list(a) for a in self.addresses], "parity": PARITY, "length": length, "layout": "one"}
        facts = state.content(0)
        for machine, keeper in enumerate(self.keepers):
            keeper.open(Terms(
                specs=shares[machine], config=facts["config"], assets=facts["assets"], lineage=facts["lineage"], session="one",
                at=0, machines={"index": machine, **agreed}, whole=[entry.spec for entry in tables[0]],
            ))  # fmt: skip

    def _share(self, step: int, machine: int) -> list[Entry]:
        held = [e for e in state.entries(step, machine, SIZE) if ((e.spec.role, e.spec.name), e.box) in self.jobs[machine]]
        return [Entry(spec := share_spec(e.spec, e.box), whole(spec.shape), e.tensor) for e in held]

    def put(self, step: int, machines: range = range(SIZE)) -> None:
        """A snapshot of the state of `step`, whole on these machines alone."""
        facts: dict[str, Any] = {"tokens": step, "metrics": {}, "scalars": state.content(step)["scalars"]}
        for machine, keeper in enumerate(self.keepers):
            memory = keeper.begin(step, facts, due=False, wait=True)
            assert memory is not None, "it waits"
            assert keeper.image is not None, "open maps it"
            proofs = [copy.run() for copy in copies(keeper.image, memory, self._share(step, machine))]
            if machine in machines:
                keeper.done(step, proofs)
        if machines == range(SIZE):
            _until(lambda: all(keeper.call("status")["spread"] == step for keeper in self.keepers))

    def kill(self, machine: int) -> None:
        """SIGKILL of one machine's keeper."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.keepers[machine].pid, signal.SIGKILL)
        _until(lambda: not alive(self.homes[machine]))

    def flip_bit(self, machine: int) -> None:
        """Another bit in the largest tensor of one machine's share; once more, and it is what it was."""
        keeper = self.keepers[machine]
        assert keeper.image is not None, "open maps it"
        largest = max(keeper.image.places.values(), key=lambda placed: placed.num_bytes)
        for slot in keeper.slots:
            slot[keeper.image.at(largest) + 5] ^= 16

    def flip_all(self, machine: int) -> None:
        """Every byte that one machine's keeper holds, of its share and of parity, is another; once more ..."""
        for path in Path(f"/proc/{self.keepers[machine].pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a connection that ended just now
                if "memfd:waypost-snapshot" in os.readlink(path):
                    with path.open("r+b") as memory:
                        data = bytes(byte ^ 16 for byte in memory.read())
                        memory.seek(0)
                        memory.write(data)

    def gives(self, step: int | None) -> None:
        """What those that are left answer: a step to the bit, or that there is none."""
        found, _ = find(self.addresses, self.secret)
        assert (None if found is None else found.step) == step
        if found is not None:
            held = found.held(self.homes[0].parent, {})
            for (role, name), want in state.tensors(found.step).items():
                assert torch.equal(held.tensor(name, role), want), f"{role} {name} is not that of step {found.step}"


@contextlib.contextmanager
def _machines(folder: Path) -> Iterator[Machines]:
    folder.mkdir()
    machines = Machines(folder)
    try:
        yield machines
    finally:
        for number, keeper in enumerate(machines.keepers):
            keeper.close()
            machines.kill(number)


def lost(folder: Path, every: int) -> int:
    """Every way to lose up to two of four machines, and every way to lose three, with a third step half copied."""
    losses = [lost for size in range(PARITY + 2) for lost in itertools.combinations(range(SIZE), size)]
    for tried, gone in enumerate(losses[::every]):
        with _machines(folder / f"lost-{tried}") as machines:
            for step in STEPS:
                machines.put(step)
            machines.put(STEPS[-1] + 1, machines=range(SIZE - 1))
            for keeper in machines.keepers:
                keeper.close()  # as at their trainers' death
            for number in gone:
                machines.kill(number)
            machines.gives(STEPS[-1] if len(gone) <= PARITY else None)
    return len(losses[::every])


def corrupted(folder: Path, every: int) -> int:
    """One bit of every share in turn; then everything that any one, two and three of four machines hold."""
    subsets = [lost for size in range(1, PARITY + 2) for lost in itertools.combinations(range(SIZE), size)]
    with _machines(folder / "flipped") as machines:
        machines.put(1)
        bits = [((number,), machines.flip_bit) for number in range(SIZE)]
        struck = [*bits, *((lost, machines.flip_all) for lost in subsets)][::every]
        for numbers, flip in struck:
            for number in numbers:
                flip(number)
            if len(numbers) <= PARITY:
                machines.gives(1)
            else:
                state.error_of(MemoryDamaged, lambda: machines.gives(1), f"damage on machines {numbers} was not seen")
            for number in numbers:
                flip(number)
        machines.gives(1)
    return len(struck)
