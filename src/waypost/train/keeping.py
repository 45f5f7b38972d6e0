"""How a run keeps its state, level by level.

    memory   a keeper takes a snapshot after every `keep.every_steps` steps; its peers hold coded copies of each
    disk     every `save.every_steps` steps, written by the keeper in the background, or by the ranks themselves
    remote   every `keep.remote.every_saves` saves, sent from the disk in the background

Invariants
- The run's last step is on disk, and at the remote level, when `last` returns, whatever became of the keeper.
- All ranks save in the same way: where one has lost the keeper, all write to disk themselves. On several machines they do
  it always, and a step is begun in memory only once all machines hold the one before, with parity.
- What goes wrong in the background is raised, or said and tried again, at the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from waypost.core.errors import MemoryDamaged
from waypost.core.progress import say
from waypost.keep import disk
from waypost.keep.held import Held
from waypost.keep.keeper import Gone, Keeper, Terms
from waypost.keep.lineage import Lineage
from waypost.keep.snapshot import Snapshots, Stats
from waypost.keep.store import Store
from waypost.keep.wire import LOG
from waypost.model import hf
from waypost.train import prepare
from waypost.train.across import Across, end_across
from waypost.train.cadence import Cadence
from waypost.train.finding import await_end, end_keeper, forget, from_remote, held_here, introduce, look
from waypost.train.parallel import World
from waypost.train.prepare import Materials
from waypost.train.recipe import TrainRecipe
from waypost.train.sending import Sender
from waypost.train.trainer import Trainer


class Keeping:
    """Keeps one run's state. Every rank has one and calls the same methods in the same order."""

    def __init__(self, recipe: TrainRecipe, folder: Path, store: Store, world: World) -> None:
        self.recipe, self.folder, self.store, self.world = recipe, folder, store, world
        self.keeper: Keeper | None = None
        self.snapshots: Snapshots | None = None
        self.sender = Sender(recipe, store)
        self.cadence = Cadence(recipe, world)
        self.across = Across(recipe, folder, world)

    @property
    def stats(self) -> Stats | None:
        """What snapshots have cost; None without a keeper."""
        return self.snapshots.stats if self.snapshots is not None else None

    def newest(self) -> Held | None:
        """The state that an earlier trainer of this run left with its keeper, unless the disk has a newer one.

        A recipe without a keeper has the one that is there write everything to disk and end.
        """
        held = self.across.newest(self.store)
        if held is not None:
            return held
        found = self.world.first(self.folder, lambda: look(self.recipe, self.folder, self.store))
        if self.recipe.keep.memory == "off" or self.across.crew is not None:
            self.world.first(self.folder, lambda: end_keeper(self.folder))
            found = False
        if not found:
            self.world.first(self.folder, lambda: from_remote(self.recipe, self.store))
            return None
        if self.keeper is None:
            self.world.all(self.folder, self._connect)
        keeper = self.keeper
        assert keeper is not None, "connected"
        step = self.world.first(self.folder, lambda: keeper.call("status")["newest"])
        latest = self.store.latest()
        if step is None or (latest is not None and (latest.step or 0) > step):
            return None
        return keeper.newest(step)

    def forget(self, step: int, found: MemoryDamaged) -> None:
        """What `newest` gave turned out damaged while it was read; `newest` gives the next best then."""
        if self.across.forget(step, found):
            return
        keeper = self.keeper
        assert keeper is not None, "it gave the snapshot"
        self.world.first(self.folder, lambda: forget(keeper, step, found))

    def start(self, trainer: Trainer, materials: Materials, lineage: Lineage) -> None:
        """Before the first step: with keep.memory, finds or starts the keeper and hooks into the trainer."""
        self._attach(trainer, materials, lineage)
        self.keeper = self.across.connect(trainer.entries()) or self.keeper
        if self.across.unsafe:  # it came from keepers of several machines who give it up now
            self._write(self.across.metrics, remote=False)
        self.across.safe()
        keep, save = self.recipe.keep, self.recipe.save
        if keep.memory == "off":
            return
        if self.keeper is None:
            self.world.first(self.folder, lambda: Keeper.start(self.folder, keep.idle_minutes * 60).close())
            self.world.all(self.folder, self._connect)
        assert self.keeper is not None, "connected"
        terms = Terms(
            config=self.config, assets=materials.assets, lineage=lineage, session=self.world.first(self.folder, disk.nonce),
            at=trainer.position.step, copies=keep.copies, keep_last=save.keep_last, keep_every=save.keep_every,
            **held_here(keep, self.across.share, self.world, self.folder, trainer),
        )  # fmt: skip
        keeper = self.keeper
        self.world.all(self.folder, lambda: keeper.open(terms))
        self.snapshots = Snapshots(keeper)
        trainer.before_state_mutation = self.before_state_mutation
        if self.world.rank == 0:
            introduce(keep, keeper)

    def _attach(self, trainer: Trainer, materials: Materials, lineage: Lineage) -> None:
        """What is kept."""
        self.trainer, self.materials, self.lineage = trainer, materials, lineage
        self.config = hf.config_to_hf(materials.config, self.recipe.precision.dtype)

    def _connect(self) -> None:
        self.keeper = Keeper(self.across.home, self.world.rank)

    def before_state_mutation(self) -> None:
        """The trainer's hook."""
        if self.snapshots is not None:
            self._held(self.snapshots.before_state_mutation)

    def after_step(self, line: Mapping[str, Any], due: bool) -> None:
        """After each step but the last; `due`: this step goes to disk. Raises what failed in the background before."""
        self.cadence.step()
        if self.recipe.save.every_steps == "auto":
            due = self.world.first(self.folder, lambda: self.cadence.saves(self._costs()))
        remote = due and self.cadence.sends(self._costs())
        if self.recipe.keep.memory == "on" and (due or self.trainer.position.step % self.recipe.keep.every_steps == 0):
            kept = self._take(line, due, remote) if self.across.crew is None else self._take_in_step(line)
            if not due or all(self.world.gather(kept)):
                return
        if due:
            self._write(line, remote)

    def _take_in_step(self, line: Mapping[str, Any]) -> bool:
        """A snapshot on several machines; False, because it is the ranks who write to the disk that these share."""
        if self.across.in_step(self.keeper):
            self._take(line, due=False, remote=False)
        elif self.across.share is None:
            self.snapshots = None  # the keeper stays: without a trainer it would end, with the last step that all hold
        return False

    def _costs(self) -> dict[str, float]:
        """Seconds that the last save to each level took, where this process knows."""
        costs = {} if self.keeper is None else dict(self.keeper.costs)
        return costs if self.sender.seconds is None else {**costs, "remote_s": self.sender.seconds}

    def _say_notes(self) -> None:
        """What the background wants a person to hear."""
        notes = self.sender.notes()
        if self.keeper is not None:
            notes, self.keeper.notes = [*notes, *self.keeper.notes], []
        for note in notes:
            say(f"note: {note}")

    def last(self, line: Mapping[str, Any]) -> Path:
        """After the last step: returns its checkpoint once it is on disk and sent, and ends the keeper."""
        if self.recipe.keep.memory == "on" and self.across.crew is None:
            kept = self._take(line, due=True, remote=True) and self.snapshots is not None and self._held(self.snapshots.flush)
            if all(self.world.gather(kept)):
                self.world.first(self.folder, self._finish)
        self.close()
        folder = self.store.folder(self.trainer.position.step)
        if not self.world.first(self.folder, folder.is_dir):
            self._write(line, remote=True)
        self.world.first(self.folder, lambda: end_across(self.folder))
        self.world.first(self.folder, self._arrived)
        return folder

    def end(self, trainer: Trainer, materials: Materials, lineage: Lineage) -> None:
        """Without a step to take: what an earlier trainer left with its keeper goes to disk, the keeper ends, and the
        newest step goes to the remote level if it is not there."""
        self.close()
        self._attach(trainer, materials, lineage)
        if self.across.found is not None:  # keepers of several machines have no disk, the same ones neither
            self._write(self.across.metrics, remote=False)
        self.world.first(self.folder, lambda: end_keeper(self.folder))
        self.world.first(self.folder, lambda: end_across(self.folder))
        self.world.first(self.folder, self._arrived)

    def _arrived(self) -> None:
        """Returns once the newest step is at the remote level."""
        try:
            self.sender.settle()
        finally:
            self._say_notes()

    def close(self) -> None:
        """Leaves the keeper to itself."""
        if self.keeper is not None:
            self.keeper.close()
        self.keeper = self.snapshots = None

    def _finish(self) -> None:
        assert self.keeper is not None, "kept"
        try:
            self.keeper.finish()
            self._say_notes()
        except Gone as error:
            say(f"the keeper was lost while it wrote the last step ({error}); writing it again")

    def _take(self, line: Mapping[str, Any], due: bool, remote: bool) -> bool:
        """Begins a snapshot of the state as it is; False without a keeper."""
        if self.snapshots is None:
            return False
        at = self.trainer.position
        scalars = prepare.state_scalars(self.trainer, self.materials.train)
        facts = {"tokens": at.tokens, "metrics": dict(line), "scalars": dict(scalars)}
        entries, share = self.trainer.entries(), self.across.share
        entries, snapshots = entries if share is None else share.entries(entries), self.snapshots
        taken = self._held(lambda: snapshots.take(at.step, entries, facts, due=due, wait=due, remote=remote))
        if taken:
            self._say_notes()
        return taken

    def _held(self, call: Callable[[], object]) -> bool:
        """Makes a call to the snapshots; False where their keeper is gone, which is said."""
        try:
            call()
        except Gone as error:
            self._lost(error)
            return False
        return True

    def _lost(self, error: Gone) -> None:
        """Goes on without the keeper, once it is sure that it does not write into the run's folder any more."""
        await_end(self.across.home, error)
        self.close()
        say(f"rank {self.world.rank}: the keeper is gone ({error}). Training goes on; checkpoints are written to disk "
            f"directly, and what was in memory alone is lost. See {self.across.home / LOG}")  # fmt: skip

    def _write(self, line: Mapping[str, Any], remote: bool) -> None:
        """A checkpoint on disk, written by the ranks themselves; `remote`: sent from there by the first one."""
        at = self.trainer.position
        self._say_notes()
        with self.cadence.saving():
            self.store.save(
                at.step, entries=self.trainer.entries(), config=self.config, lineage=self.lineage, tokens=at.tokens,
                scalars=prepare.state_scalars(self.trainer, self.materials.train), assets=self.materials.assets,
                metrics=dict(line),
            )  # fmt: skip
        if remote and self.world.rank == 0:
            self.sender.send(at.step)
