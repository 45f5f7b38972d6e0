"""Keepers of several machines, which addresses of the loopback stand for: any loss up to the parity costs nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from keep_cases import entry
from keeper_cases import FACTS, no_keeper_left, terms, until

from waypost.core.errors import MemoryDamaged
from waypost.core.state import Entry, whole
from waypost.keep import network
from waypost.keep.agreement import share_out
from waypost.keep.erasure import Code
from waypost.keep.grid import Grid, share_spec
from waypost.keep.held import Held
from waypost.keep.image import Image, copies
from waypost.keep.keeper import Keeper
from waypost.keep.machines import Found, Machines, find
from waypost.keep.network import shared_secret
from waypost.keep.wire import Gone, Line, alive, read_record

pytest.importorskip("zfec")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path) -> Iterator[None]:
    with no_keeper_left(tmp_path):
        yield


@settings(max_examples=12)
@drawn(st.integers(1, 3), st.integers(1, 2), st.integers(1, 20_000), st.randoms(use_true_random=False))
def test_any_machines_that_are_enough_give_every_share_back(data: int, parity: int, size: int, rng: random.Random) -> None:
    """Against bytes held in dictionaries; every way to lose up to `parity` machines, and every way to lose one more."""
    shares = [rng.randbytes(rng.randint(0, size)) for _ in range(data + parity)]
    grid = Grid.of(Code(data, parity), map(len, shares))
    held = {(h, "data"): share.ljust(data * grid.length, b"\0") for h, share in enumerate(shares)}

    def fetch(machine: int, kind: str, offset: int, out: memoryview) -> None:
        out[:] = held[machine, kind][offset : offset + len(out)]

    for h in range(grid.size):
        parts = [bytes(grid.coded(h, number, 0, grid.length, fetch)) for number in range(parity)]
        held[h, "parity"] = b"".join(parts)
    everyone = set(range(grid.size))
    for count in range(parity + 2):
        for lost in itertools.combinations(everyone, count):
            left = everyone - set(lost)
            assert grid.determined(left, left) == (count <= parity)
            for h in lost if count <= parity else ():
                out = memoryview(bytearray(len(shares[h])))
                grid.restored(h, 0, out, fetch, lambda other, kind, left=left: other in left)  # type: ignore[misc]
                assert bytes(out) == shares[h]


class Run:
    """Three machines that hold a state together: a tensor cut over them, one that all hold, one that is empty."""

    def __init__(self, folder: Path, parity: int = 1, count: int = 3) -> None:
        self.homes = [folder / f"127.0.0.{2 + number}" for number in range(count)]
        self.secret_file = folder / network.SECRET
        self.secret = shared_secret(folder)
        self.parity, self.layout, self.keepers = parity, "first", []
        for home in self.homes:
            home.mkdir(exist_ok=True)
            if not alive(home):
                Keeper.start(home, 60.0, (home.name, self.secret_file)).close()
            self.keepers.append(Keeper(home))

    def state(self, step: int) -> dict[str, torch.Tensor]:
        source = torch.Generator().manual_seed(step)
        return {"cut": torch.randn(300, 700, generator=source), "same": torch.randn(77, 3, generator=source),
                "empty": torch.zeros(0, 4), "scalar": torch.tensor(float(step))}  # fmt: skip

    def tables(self, step: int) -> list[list[Entry]]:
        count, found = len(self.homes), []
        for machine in range(count):
            held = []
            for name, tensor in self.state(step).items():
                if name == "cut":
                    rows = tuple(machine * 300 // count + extra * 300 // count for extra in (0, 1))
                    held.append(entry(name, tensor, box=(rows, (0, 700))))
                else:
                    held.append(entry(name, tensor))
            found.append(held)
        return found

    def shares(self, step: int) -> list[list[Entry]]:
        tables = self.tables(step)
        jobs = share_out([[(e.spec, e.box) for e in table] for table in tables])
        return [
            [Entry(s := share_spec(e.spec, e.box), whole(s.shape), e.tensor) for e in table
             if ((e.spec.role, e.spec.name), e.box) in mine]
            for table, mine in zip(tables, jobs, strict=True)
        ]  # fmt: skip

    def open(self, at: int = 0, addresses: Sequence[Any] | None = None, machines: Sequence[int] | None = None) -> None:
        """On all machines, or some. `addresses`: what they are told of each other, where that is wrong."""
        shares = self.shares(0)
        code = Code(len(self.homes) - self.parity, self.parity)
        length = Grid.of(code, [Image.of(e.spec for e in share).num_bytes for share in shares]).length
        agreed = {"addresses": addresses or self.addresses, "parity": self.parity, "length": length, "layout": self.layout}
        for index in range(len(self.homes)) if machines is None else machines:
            own = terms(shares[index], at=at, machines={"index": index, **agreed}, whole=[e.spec for e in self.tables(0)[0]])
            self.keepers[index].open(own)

    @property
    def addresses(self) -> list[list[Any]]:
        return [read_record(home)["network"] for home in self.homes]

    def begin(self, step: int, machines: Sequence[int] | None = None) -> list[list[Any]]:
        work, shares = [], self.shares(step)
        for index in range(len(self.homes)) if machines is None else machines:
            keeper, share = self.keepers[index], shares[index]
            memory = keeper.begin(step, FACTS, due=False, wait=True)
            assert memory is not None
            assert keeper.image is not None
            work.append(list(copies(keeper.image, memory, share)))
        return work

    def put(self, step: int) -> None:
        for keeper, work in zip(self.keepers, self.begin(step), strict=True):
            keeper.done(step, [copy.run() for copy in work])
        until(lambda: all(keeper.call("status")["spread"] == step for keeper in self.keepers))

    def leave(self) -> None:
        for keeper in self.keepers:
            keeper.close()

    def kill(self, machine: int) -> None:
        os.kill(read_record(self.homes[machine])["pid"], signal.SIGKILL)
        until(lambda: not alive(self.homes[machine]))

    def found(self) -> Found | None:
        return find([(host, port) for host, port in self.addresses], self.secret)[0]

    def holds(self, step: int, local: Mapping[Any, Callable[[int, memoryview], None]] | None = None) -> Held:
        found = self.found()
        assert found is not None
        assert found.step == step
        held = found.held(self.homes[0].parent, local or {})
        for name, want in self.state(step).items():
            assert torch.equal(held.tensor(name), want), name
        part = Entry(held.specs["weight", "cut"], ((95, 205), (13, 600)), torch.empty(110, 587))
        held.read_all([part])
        assert torch.equal(part.tensor, self.state(step)["cut"][95:205, 13:600]), "a box that lies across machines"
        assert (held.scalars, held.tokens) == (FACTS["scalars"], FACTS["tokens"])
        return held


@pytest.mark.parametrize(("count", "parity"), [(3, 1), (4, 2)])
def test_losing_as_many_machines_as_there_is_parity_costs_nothing(count: int, parity: int, tmp_path: Path) -> None:
    run = Run(tmp_path, parity, count)
    run.open()
    assert run.found() is None
    for step in (1, 2, 3):
        run.put(step)
    run.leave()
    run.holds(3)
    for lost in range(parity):
        run.kill(lost)
        run.holds(3)
    run.kill(parity)
    assert run.found() is None, "one more than there is parity"


def test_a_step_that_some_machines_have_not_got_is_not_taken(tmp_path: Path) -> None:
    """The death of all trainers in the middle of a step: the one before is what the machines have in common."""
    run = Run(tmp_path)
    run.open()
    run.put(1)
    work = run.begin(2)
    for machine in (0, 1):
        run.keepers[machine].done(2, [copy.run() for copy in work[machine]])
    run.leave()
    run.kill(0)
    run.holds(1)


def test_the_same_machines_keep_what_they_hold_and_others_begin_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open()
    for step in (1, 2):
        run.put(step)
    run.open(at=1)  # step 2 is of a future that this trainer has not reached
    run.holds(1)
    run.put(2)
    run.leave()
    run.kill(2)
    run.holds(2)
    again = Run(tmp_path)
    again.layout = "second"
    again.open(at=2)
    assert again.found() is None
    again.put(3)
    again.holds(3)
    again.leave()


def test_a_bit_flipped_in_one_machine_s_memory_is_made_up_for_by_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open()
    run.put(1)
    slots = run.keepers[0].slots
    for slot in slots:
        slot[-5000] ^= 4
    run.leave()
    held = run.holds(1)
    run.kill(1)
    with pytest.raises(MemoryDamaged, match=r"weight 'cut', rows \d+ to \d+"):
        held.tensor("cut")


def damaged(run: Run, machines: Sequence[int]) -> None:
    """Every byte that these machines hold of their shares is another; once more, and it is the old one."""
    for machine in machines:
        for slot in run.keepers[machine].slots:
            slot ^= 16


def test_shares_damaged_on_as_many_machines_as_there_is_parity_cost_nothing(tmp_path: Path) -> None:
    """And one beside a lost one: what a damaged machine gives of another's share is passed over."""
    run = Run(tmp_path, parity=2, count=4)
    run.open()
    run.put(1)
    for pair in ((0, 1), (1, 2), (0, 3)):
        damaged(run, pair)
        run.holds(1)
        damaged(run, pair)
    run.kill(0)
    damaged(run, [1])
    run.holds(1)
    damaged(run, [2])
    found = run.found()
    assert found is not None
    with pytest.raises(MemoryDamaged, match=r"weight 'cut', rows \d+ to \d+"):
        found.held(tmp_path, {}).tensor("cut")
    run.leave()


def test_damage_where_the_parity_is_not_coded_yet_is_damage_too(tmp_path: Path) -> None:
    """What was whole on all machines when the trainers died; so that the next best is taken, not the error returned."""
    run = Run(tmp_path)
    run.open(addresses=[*run.addresses[:2], ["127.0.0.4", 1]])  # the third codes its parity, the others cannot
    work = run.begin(1)
    for keeper, copied in zip(run.keepers, work, strict=True):
        keeper.done(1, [copy.run() for copy in copied])
    until(lambda: [bool(k.call("status")["alone"]) for k in run.keepers] == [True, True, False])
    until(lambda: run.keepers[2].call("status")["spread"] == 1)
    damaged(run, [2])
    held = run.found()
    assert held is not None
    with pytest.raises(MemoryDamaged, match=r"weight 'cut', rows 200 to 300"):
        held.held(tmp_path, {}).tensor("cut")
    run.leave()


def test_a_step_that_could_not_be_coded_is_coded_once_the_machines_answer_again(tmp_path: Path) -> None:
    """Until then no machine says that its parity is there."""
    run = Run(tmp_path)
    run.open()
    run.put(1)
    work = run.begin(2)
    for machine in (0, 1):
        run.keepers[machine].done(2, [copy.run() for copy in work[machine]])
    run.keepers[2].close()  # its trainer dies: the others are told at once that there is no step 2
    until(lambda: all(run.keepers[machine].call("status")["alone"] for machine in (0, 1)))
    assert [run.keepers[machine].call("status")["spread"] for machine in (0, 1)] == [1, 1]
    run.leave()
    again = Run(tmp_path)
    again.open(at=2, machines=[2])  # the third comes to hold it after all
    again.keepers[2].done(2, [copy.run() for copy in again.begin(2, machines=[2])[0]])
    until(lambda: again.keepers[2].call("status")["spread"] == 2)
    again.open(at=2, machines=[0, 1])
    until(lambda: all(keeper.call("status")["spread"] == 2 for keeper in again.keepers))
    again.leave()
    again.kill(2)
    again.holds(2)


def test_a_machine_that_answers_again_is_called_anew(tmp_path: Path) -> None:
    """A connection that broke is not used again."""
    asked = []

    def answer(other: socket.socket) -> None:
        for attempt in range(2):
            line = Line(other.accept()[0])
            network.admit(line, b"secret")
            with contextlib.suppress(Gone):
                while attempt or not asked:
                    request, _ = line.receive()
                    asked.append(request["call"])
                    size = request.get("size", 0)
                    if attempt:
                        line.send({"ok": {"specs": [], "proofs": [], "bytes": size}})
                        line.send_bytes(memoryview(bytearray(b"x" * size)))
            line.close()

    with network.listen("127.0.0.1") as other:
        threading.Thread(target=answer, args=(other,), daemon=True).start()
        addresses = [["127.0.0.1", 1], list(other.getsockname())]
        machines = Machines({"index": 0, "addresses": addresses, "parity": 1, "length": 4096, "layout": "one"}, b"secret")
        with pytest.raises(Gone, match="the connection was closed"):
            machines.put(1, -1, {})
        machines.put(1, -1, {})
        assert asked == ["part", "part", "piece"]
        held = memoryview(bytearray(4096))
        machines.read(1, 0, held)
        assert bytes(held) == b"x" * 4096, "with one of data, parity is a copy"
        machines.close()


def test_a_machine_that_misses_a_step_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.open()
    run.put(1)
    work = run.begin(2)
    run.kill(2)
    for machine in (0, 1):
        run.keepers[machine].done(2, [copy.run() for copy in work[machine]])
    until(lambda: all(run.keepers[machine].call("status")["alone"] for machine in (0, 1)))
    assert "the keeper at 127.0.0.4:" in run.keepers[0].call("status")["alone"]
    run.leave()
    run.holds(1)
