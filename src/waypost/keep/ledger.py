"""Which slot of a keeper's memory holds what: the rules, without sockets, threads or bytes.

    free -> filling(step) -> whole(step) -> free

Invariants
- A slot is whole only after every rank said that its share of that very step is copied.
- The newest whole slot is given up only when a newer one is whole, so a copy that breaks off costs nothing that was there.
- A slot that waits to be written to disk, or is being written, is never filled.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Slot:
    """One snapshot's memory. `step` is None while it is free."""

    index: int
    step: int | None = None
    whole: bool = False
    due: bool = False
    """Waits to be written to disk."""
    remote: bool = False
    """Goes from the disk to the remote level then."""
    pinned: bool = False
    """Is being written to disk."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What belongs to the step beside tensors."""
    proofs: list[Any] = field(default_factory=list)
    """Digests of everything that was copied; see `image.Proof`."""
    spreading: bool = False
    """Is being coded and sent to peers."""
    waiting: set[Hashable] = field(default_factory=set)
    """Ranks whose share is not copied yet."""

    def clear(self) -> None:
        """Frees the slot."""
        self.step, self.whole, self.due, self.remote = None, False, False, False
        self.facts, self.proofs, self.waiting = {}, [], set()


class Ledger:
    """The slots of one keeper, for `ranks` that fill them together."""

    def __init__(self, num_slots: int, ranks: int) -> None:
        self.slots = [Slot(index) for index in range(num_slots)]
        self.ranks = ranks
        self._refused: int | None = None

    def newest(self) -> Slot | None:
        """The whole slot of the latest step."""
        whole = [slot for slot in self.slots if slot.whole]
        return max(whole, key=lambda slot: slot.step or 0, default=None)

    def whole(self, step: int) -> Slot | None:
        """The whole slot of `step`."""
        return next((slot for slot in self.slots if slot.whole and slot.step == step), None)

    def begin(self, step: int, *, due: bool, wait: bool) -> Slot | None:
        """The slot that every rank fills with `step`; None where none is free: then the step is left out for all ranks,
        or with `wait` asked for again."""
        found = next((slot for slot in self.slots if slot.step == step and not slot.whole), None)
        if found is not None:
            return found
        if step == self._refused and not wait:
            return None
        newest = self.newest()
        busy = [s for s in self.slots if s.due or s.pinned or s.spreading or (s.step is not None and not s.whole)]
        able = [s for s in self.slots if s not in busy and s is not newest]
        if not able:
            self._refused = step
            return None
        slot = min(able, key=lambda slot: -1 if slot.step is None else slot.step)
        slot.clear()
        slot.step, slot.due, slot.waiting = step, due, set(range(self.ranks))
        return slot

    def done(self, step: int, rank: int, proofs: Sequence[Any] = ()) -> bool:
        """Rank `rank` has copied its share of `step`; True once all have, and the slot is whole."""
        slot = next((slot for slot in self.slots if slot.step == step and not slot.whole), None)
        if slot is None:
            return False
        if rank in slot.waiting:
            slot.proofs += proofs
        slot.waiting.discard(rank)
        slot.whole = not slot.waiting
        return slot.whole

    def abandon(self) -> None:
        """Forgets what was being filled: somebody who filled it is gone."""
        for slot in self.slots:
            if slot.step is not None and not slot.whole:
                slot.clear()

    def rewind(self, step: int) -> None:
        """Forgets what is whole of steps after `step`, none of which is being spread: the trainer begins again before them."""
        for slot in self.slots:
            if slot.step is not None and slot.step > step and not slot.pinned:
                slot.clear()

    def next_due(self) -> Slot | None:
        """The whole slot of the earliest step that waits to be written."""
        due = [slot for slot in self.slots if slot.whole and slot.due and not slot.pinned]
        return min(due, key=lambda slot: slot.step or 0, default=None)
