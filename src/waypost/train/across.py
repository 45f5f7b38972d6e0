"""What keepers of several machines hold of a run, from one start to the next: found, made safe, gone on with, ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from waypost.core.errors import CheckpointError
from waypost.core.progress import say
from waypost.core.state import Entry
from waypost.keep.held import Held
from waypost.keep.keeper import START_S, Gone, Keeper
from waypost.keep.machines import Found, find
from waypost.keep.network import Address, Caller, shared_secret
from waypost.keep.store import Store
from waypost.keep.wire import RECORD, read_record
from waypost.train.crew import KEEPERS, Crew, Share
from waypost.train.parallel import World
from waypost.train.recipe import TrainRecipe

T = TypeVar("T")


class Across:
    """Every rank has one and calls the same methods in the same order; they are collective. `crew` is None where this run is
    on one machine, which may still go on with what several held."""

    def __init__(self, recipe: TrainRecipe, folder: Path, world: World) -> None:
        self.recipe, self.folder, self.world = recipe, folder, world
        self.crew = Crew.of(recipe.keep, folder, world)
        self.home = folder if self.crew is None else self.crew.home
        """Where this machine's keeper is."""
        self.share: Share | None = None
        """What the machines hold; None on one, and once their keepers cannot go on."""
        self.found: Found | None = None
        """Where the state came from, if from keepers of several machines."""
        self.metrics: Mapping[str, Any] = {}
        """Those of the step that was found."""
        self._damaged: set[int] = set()

    def newest(self, store: Store) -> Held | None:
        """The state that keepers of several machines hold, if it is newer than the disk's."""
        latest = store.latest()
        newer_than = -1 if latest is None else latest.step or 0
        found = self._on_all(lambda: find_across(self.folder, newer_than, self._damaged, self.world.rank > 0))
        if len(set(self.world.gather(None if found is None else (found.step, found.layout)))) > 1:
            raise CheckpointError(f"{self.folder}: the ranks reach different keepers of earlier machines; see that every "
                                  "machine reaches the others, or end them all")  # fmt: skip
        if found is None:
            return None
        if self.world.rank == 0 and found.lost:
            say(f"{found.lost} of {found.grid.size} machines' keepers are lost; step {found.step} comes from the others")
        local = {} if self.crew is None else self.crew.local_memory(found.step)
        held = self._on_all(lambda: found.held(self.folder, local))
        self.found, self.metrics = found, held.metrics
        return held

    def _on_all(self, call: Callable[[], T]) -> T:
        """What `call` gives on this rank, once it went well on all; collective."""
        mine: list[T] = []
        self.world.all(self.folder, lambda: mine.append(call()))
        return mine[0]

    def forget(self, step: int, damage: Exception) -> bool:
        """Passes over a step that turned out damaged on more machines than the parity makes up for; False where it is none
        of theirs."""
        if self.found is None:
            return False
        if self.world.rank == 0:
            say(f"the machines' snapshot of step {step} is damaged ({damage}): it is not used. Have their memory tested")
        self.found = None
        self._damaged.add(step)
        return True

    def connect(self, entries: list[Entry]) -> Keeper | None:
        """This machine's keeper, once it is settled what each holds; None on one machine."""
        if self.crew is None:
            return None
        keeper = self.crew.connect(self.recipe.keep.idle_minutes * 60)
        self.share = self.crew.share(entries, self.found)
        return keeper

    @property
    def unsafe(self) -> bool:
        """Whether the state must go to disk before the keepers that it came from give it up: they are not the same any more,
        or not all of them."""
        return self.found is not None and (self.share is None or not self.share.kept)

    def safe(self) -> None:
        """What was found is on disk, or kept as it is: keepers that are not this run's any more end."""
        mine = [] if self.share is None else [(host, port) for host, port in self.share.agreed["addresses"]]
        if self.unsafe:
            self.world.first(self.folder, lambda: end_across(self.folder, but=mine))
        self.found = None

    def in_step(self, keeper: Keeper | None) -> bool:
        """Whether all machines hold the snapshot before, and parity of it, so that the next may begin. Once one of them
        cannot go on, none does: `share` is None then."""
        if self.share is None:
            return False
        said: dict[str, Any] = {"alone": "its keeper is gone"}
        if keeper is not None:
            with contextlib.suppress(Gone):
                said = keeper.call("status")
        whole = all(slot["whole"] or slot["step"] is None for slot in said.get("slots", ()))
        ready = whole and said.get("newest") in (None, said.get("spread"))
        everyone = self.world.gather((ready, said["alone"]))
        causes = [f"rank {rank}: {cause}" for rank, (_, cause) in enumerate(everyone) if cause is not None]
        if causes:
            self.share = None
            if self.world.rank == 0:
                say(f"{causes[0]}. Training goes on, and no more snapshots are taken in memory: the last one that all machines "
                    "hold stays while this run trains. The next start of the run brings new keepers up")  # fmt: skip
        return not causes and all(ready for ready, _ in everyone)


def addresses_of(folder: Path) -> list[Address]:
    """Where the keepers of several machines were, if the run ever had any. One that is just ending is none."""
    records = []
    for path in sorted((folder / KEEPERS).glob(f"*/{RECORD}")):
        with contextlib.suppress(FileNotFoundError):
            records.append(read_record(path.parent))
    return [(record["network"][0], record["network"][1]) for record in records if "network" in record]


def find_across(folder: Path, newer_than: int, skip: Collection[int], quiet: bool) -> Found | None:
    """The newest step that the keepers of several machines hold, if it is newer than that on the disk."""
    addresses = addresses_of(folder)
    if not addresses:
        return None
    found, causes = find(addresses, shared_secret(folder / KEEPERS), skip)
    for cause in () if quiet else causes:
        say(cause)
    return found if found is not None and found.step > newer_than else None


def end_across(folder: Path, but: Collection[Address] = ()) -> None:
    """Ends the keepers of several machines, but for those at some addresses, and waits until they are gone."""
    for address in addresses_of(folder):
        deadline = time.monotonic() + START_S
        with contextlib.suppress(Gone):
            while address not in but:
                Caller(address, shared_secret(folder / KEEPERS)).call("finish")
                if time.monotonic() > deadline:
                    raise CheckpointError(f"the keeper at {address[0]}:{address[1]} does not end; see {folder / KEEPERS}")
                time.sleep(0.05)
