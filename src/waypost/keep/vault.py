"""What a keeper holds and what it does with it: the calls of a trainer, and the threads behind them. No sockets here.

    memory   slots of the ledger, filled by the trainer's ranks through the descriptors that `open` hands out
    disk     a thread writes what is due, as it lies
    remote   `uploads` sends what is on disk
    peers    a thread codes the newest snapshot and spreads it (see `erasure`)

Invariant: what a client is told to be whole is whole, and is what that step's state was; see `ledger`.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from waypost.core.errors import CheckpointError, ConfigError, MemoryDamaged, WaypostError
from waypost.keep.copying import store_at
from waypost.keep.erasure import Code, Peers
from waypost.keep.image import Image, specs_of, taken
from waypost.keep.ledger import Ledger, Slot
from waypost.keep.machines import Machines
from waypost.keep.persist import facts_of, persist
from waypost.keep.store import Store
from waypost.keep.uploads import Uploads
from waypost.keep.wire import PROTOCOL

RETRY_S = 10.0
"""Seconds between two attempts to write to a disk that refused."""

Reply = tuple[dict[str, Any], list[int]]


class Vault:
    """One run's snapshots. Every call may come from a thread of its own; `changed` is the lock over everything here."""

    def __init__(self, folder: Path, secret: bytes = b"") -> None:
        """`secret`: what the keepers of several machines share; see `network`."""
        self.folder, self.nonce, self.secret = folder, secrets.token_hex(16), secret
        self.changed = threading.Condition()
        self.image: Image | None = None
        self.table: list[Any] = []
        self.ledger = Ledger(0, 1)
        self.fds: list[int] = []
        self.common: dict[str, Any] = {}
        self.store = Store(folder)
        self.persisted: int | None = None
        self.persist_s = 0.0
        self.disk = True
        self.owed = False
        """A snapshot that was due turned out damaged: the next one is due in its place."""
        self.notes: list[str] = []
        self.uploads: Uploads | None = None
        self.remote: Mapping[str, Any] | None = None
        self.peers: Peers | Machines | None = None
        self.spread_step = -1
        self.spread_s: float | None = None
        self.alone: str | None = None
        """Why spreading has failed, which is not tried again before the next session."""
        self.failure: WaypostError | None = None
        self.retry_at = 0.0
        self.ending = False
        self.session = ""
        self.clients = 0
        self.idle_since = time.monotonic()

    def start(self) -> None:
        """The threads behind the calls."""
        for loop in (self._persist_loop, self._spread_loop):
            threading.Thread(target=loop, daemon=True).start()

    def end(self) -> None:
        """Asks for the end; safe in a signal handler."""
        self.ending = True

    def over(self, idle_s: float) -> bool:
        """Whether to go: told to or idle for long enough, and nothing waits to be written, or writing failed till the end."""
        with self.changed:
            idle = self.clients == 0 and time.monotonic() - self.idle_since >= idle_s
            if self.ending or idle:
                self._make_newest_due()
                self.changed.notify_all()
                return self._settled() or self.failure is not None
            return False

    def _settled(self) -> bool:
        sent = self.uploads is None or not self.uploads.busy
        return sent and not any(slot.due or slot.pinned for slot in self.ledger.slots)

    def _spreading(self) -> bool:
        return any(slot.spreading for slot in self.ledger.slots)

    def _make_newest_due(self) -> None:
        newest = self.ledger.newest() if self.disk else None
        if newest is not None and (self.persisted is None or (newest.step or 0) > self.persisted):
            newest.due = True

    def rank_left(self, session: str) -> None:
        """A torn snapshot is forgotten; once no rank is left, the newest whole one goes to disk at once."""
        with self.changed:
            if session != self.session:
                return
            self.clients -= 1
            self.ledger.abandon()
            if self.clients == 0:
                self.idle_since = time.monotonic()
                self._make_newest_due()
            self.changed.notify_all()

    # The calls. Each takes the fields of the request and returns (fields of the reply, descriptors).

    def hello(self, protocol: int, nonce: str) -> Reply:
        """Greets a trainer with this process's id. ConfigError for another protocol or nonce."""
        if protocol != PROTOCOL:
            raise ConfigError(f"the keeper speaks protocol {PROTOCOL}, the trainer {protocol}; end the keeper with "
                              f"kill {os.getpid()}: it writes what it holds to disk first")  # fmt: skip
        if not secrets.compare_digest(nonce, self.nonce):
            raise ConfigError("another nonce than this keeper's; it belongs to another run")
        return {"pid": os.getpid()}, []

    def newest(self, step: int | None = None) -> Reply:
        """Everything of the newest whole snapshot, or of the one of `step`, and its memory."""
        with self.changed:
            slot = self.ledger.newest() if step is None else self.ledger.whole(step)
            if slot is None or self.image is None:
                return {"step": None}, []
            return {"step": slot.step, "specs": self.table, "proofs": slot.proofs, **slot.facts}, [self.fds[slot.index]]

    def drop(self, step: int) -> Reply:
        """Forgets a whole snapshot that turned out damaged."""
        with self.changed:
            slot = self.ledger.whole(step)
            if slot is not None and not (slot.pinned or slot.spreading):
                slot.clear()
            return {}, []

    def open(self, session: str, specs: list[Any], slots: int, at: int, common: dict[str, Any], ranks: int = 1,
             keep_last: int = 3, keep_every: int | None = None, disk: bool = True, remote: dict[str, Any] | None = None,
             peers: dict[str, Any] | None = None, machines: dict[str, Any] | None = None) -> Reply:  # fmt: skip
        """Memory for `slots` snapshots of the table `specs`, which the `ranks` of a session fill together. Every rank
        calls it with the same words and gets the same memory. A new session ends the one before it: its torn snapshot
        and whole ones of steps after `at` are forgotten, older ones stay.

        disk     whether what is in memory alone goes to disk when the trainer is gone; a stripe's keeper has none
        remote   arguments of `copying.store_at`
        peers    {"folders": [...], "data": k, "parity": m}: keepers that hold coded copies
        machines what a `Machines` is made of: this memory is one machine's share
        """
        with self.changed:
            self.changed.wait_for(lambda: session == self.session or not self._spreading())
            if session != self.session:
                self.session, self.clients = session, 0
                self.retry_at, self.failure = 0.0, None  # what the last trainer ran into may be mended
                self.changed.notify_all()
                self.ledger.abandon()
                if (self.table, len(self.fds)) != (specs, slots) or self._machines() not in (None, machines):
                    self._replace_memory(specs, slots, ranks)
                self.ledger.ranks, self.common, self.disk = ranks, common, disk
                self.ledger.rewind(at)
                self.store.keep_last, self.store.keep_every = keep_last, keep_every
                self._open_remote(remote)
                self._open_peers(peers, machines, at)
            assert self.image is not None, "a table was opened"
            self.clients += 1
            return {"bytes": self.image.num_bytes}, self.fds

    def _open_remote(self, remote: dict[str, Any] | None) -> None:
        if remote == self.remote:
            return
        if self.uploads is not None:
            self.uploads.close()
        self.uploads, self.remote = None, remote
        if remote is not None:
            self.uploads = Uploads(self.store, store_at(**remote), remote["url"])

    def _machines(self) -> dict[str, Any] | None:
        return self.peers.agreed if isinstance(self.peers, Machines) else None

    def _open_peers(self, peers: dict[str, Any] | None, machines: dict[str, Any] | None, at: int) -> None:
        self.alone = None
        if isinstance(self.peers, Machines) and self.peers.agreed == machines:
            self.peers.rewind(at)
            self.spread_step = max(self.peers.held, default=-1)
            return
        if self.peers is not None:
            self.peers.close()
        self.peers, self.spread_step = None, -1
        if machines is not None:
            self.peers = Machines(machines, self.secret)
        if peers is not None:
            assert self.image is not None, "a table was opened"
            group = Peers.at([Path(folder) for folder in peers["folders"]], Code(peers["data"], peers["parity"]))
            group.open(self.image.num_bytes, session=self.session, at=at, common={**self.common, "table": self.table})
            self.peers = group

    def _replace_memory(self, specs: list[Any], slots: int, ranks: int) -> None:
        self._make_newest_due()
        if not self._settled():
            raise ConfigError("this keeper holds a snapshot of another table that is not on disk yet")
        for fd in self.fds:
            os.close(fd)
        self.table, self.ledger, self.fds = [], Ledger(0, 1), []  # if there is no memory for more, nothing is held
        self.image = Image.of(specs_of(specs))
        self.fds = taken(slots, self.image.num_bytes)
        self.table, self.ledger = specs, Ledger(slots, ranks)

    def _check(self, session: str) -> None:
        if session != self.session:
            raise ConfigError("another trainer has taken this run over")

    def begin(self, session: str, step: int, rank: int, due: bool, wait: bool, facts: dict[str, Any],
              remote: bool = False) -> Reply:  # fmt: skip
        """The slot for `step`; with `wait`, once there is one. Raises what the disk answered since the last call."""
        with self.changed:
            self._check(session)
            due = due or self.owed
            slot = self.ledger.begin(step, due=due, wait=wait)
            while slot is None and wait:
                self._raise_failure()
                self.changed.wait()
                self._check(session)
                slot = self.ledger.begin(step, due=due, wait=wait)
            self._raise_failure()
            reply: dict[str, Any] = {"slot": None if slot is None else slot.index, "costs": self._costs(), "notes": []}
            if slot is not None:
                self.owed = self.owed and not slot.due
                slot.remote = slot.remote or remote
            if rank == 0:
                reply["notes"] = self._told()
                if slot is not None:
                    slot.facts = {**self.common, **facts}
            return reply, []

    def _costs(self) -> dict[str, float]:
        found = {"disk_s": self.persist_s if self.persisted is not None else None, "spread_s": self.spread_s}
        found["remote_s"] = self.uploads.seconds if self.uploads is not None else None
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    def _told(self) -> list[str]:
        """What a person should hear; each once."""
        notes, self.notes = self.notes, []
        return notes + (self.uploads.notes() if self.uploads is not None else [])

    def _note(self, text: str) -> None:
        self.notes.append(text)
        log(text)

    def done(self, session: str, step: int, rank: int, proofs: list[Any]) -> Reply:
        """The rank has copied its share; the snapshot is whole once all have."""
        with self.changed:
            self._check(session)
            whole = self.ledger.done(step, rank, proofs)
            if whole:
                self.changed.notify_all()
            return {"whole": whole}, []

    def drain(self) -> Reply:
        """Returns once everything that is due is on disk, and at the remote level; raises what kept it from there."""
        with self.changed:
            self.retry_at, self.failure = 0.0, None
            self.changed.notify_all()
            due = [slot for slot in self.ledger.slots if slot.due or slot.pinned]
            self.changed.wait_for(lambda: not any(s.due or s.pinned for s in due) or self.failure is not None)
            self._raise_failure()
            uploads = self.uploads
        if uploads is not None:
            uploads.drain()
        return {"persisted": self.persisted, "persist_s": self.persist_s, "notes": self._told()}, []

    def finish(self) -> Reply:
        """As `drain`, with the newest snapshot due; the keeper and its peers end then."""
        with self.changed:
            self._make_newest_due()
        reply = self.drain()
        with self.changed:
            self.changed.wait_for(lambda: not self._spreading())
            peers, self.peers = self.peers, None
        if peers is not None:
            peers.finish()
        self.end()
        return reply

    def status(self) -> Reply:
        """What is held: a line for every slot, the bytes of a snapshot, the newest step in memory, on disk and with peers,
        peers lost."""
        with self.changed:
            steps = [{"step": s.step, "whole": s.whole, "due": s.due, "pinned": s.pinned} for s in self.ledger.slots]
            size, lost = self.image.num_bytes if self.image else 0, self.peers.lost if self.peers else 0
            newest = self.ledger.newest()
            levels = {"newest": newest.step if newest else None, "persisted": self.persisted, "spread": self.spread_step}
            return {"slots": steps, "bytes": size, **levels, "persist_s": self.persist_s, "peers_lost": lost,
                    "alone": self.alone}, []  # fmt: skip

    def _raise_failure(self) -> None:
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _persist_loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.ledger.next_due() is not None)
                while (pause := self.retry_at - time.monotonic()) > 0:
                    self.changed.wait(pause)
                slot = self.ledger.next_due()
                if slot is None:
                    continue
                slot.pinned = True
            try:
                failure = self._persist(slot)
            except MemoryDamaged as error:
                self._damaged(slot, error)
                continue
            with self.changed:
                slot.pinned, slot.due, self.failure = False, failure is not None, failure
                self.retry_at = 0.0 if failure is None else time.monotonic() + RETRY_S
                self.changed.notify_all()

    def _damaged(self, slot: Slot, error: MemoryDamaged) -> None:
        """What is wrong in memory alone costs that snapshot; the next one goes to disk instead."""
        with self.changed:
            self._note(f"the snapshot of step {slot.step} is damaged in memory ({error}); it is not written to disk, the next "
                       "one is. Have the machine's memory tested")  # fmt: skip
            slot.pinned, self.owed = False, True
            slot.clear()
            self.changed.notify_all()

    def _persist(self, slot: Slot) -> WaypostError | None:
        assert self.image is not None, "a slot is due"
        assert slot.step is not None, "a slot is due"
        began = time.monotonic()
        try:
            path = persist(self.store, slot.step, self.image, self.fds[slot.index], facts_of(slot), slot.proofs)
        except MemoryDamaged:
            raise
        except WaypostError as error:
            log(f"step {slot.step}: {error}")
            return error
        except Exception as error:
            log(f"step {slot.step}: {error!r}")
            return CheckpointError(f"step {slot.step} could not be written: {error!r}")
        self.persisted, self.persist_s = slot.step, time.monotonic() - began
        log(f"wrote {path} in {self.persist_s:.2f} s")
        if self.uploads is not None and slot.remote:
            self.uploads.offer(slot.step)
        return None

    def _to_spread(self) -> Slot | None:
        """The newest whole snapshot, where the peers have not got it yet."""
        newest = self.ledger.newest() if self.peers is not None and self.alone is None else None
        return newest if newest is not None and (newest.step or 0) > self.spread_step else None

    def _spread_loop(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._to_spread() is not None)
                slot, peers = self._to_spread(), self.peers
                assert slot is not None, "just found"
                assert slot.step is not None, "it is whole"
                assert peers is not None, "just found"
                slot.spreading, lost, began = True, peers.lost, time.monotonic()
            failure = None
            try:
                peers.put(slot.step, self.fds[slot.index], {**slot.facts, "whole_proofs": slot.proofs})
            except Exception as error:
                failure = error
            with self.changed:
                slot.spreading = False
                if failure is not None:
                    self._note(f"{failure}. From now on snapshots are in one keeper's memory alone; the next start of the "
                               "run brings new peers up")  # fmt: skip
                    self.alone = str(failure)
                else:
                    self.spread_step, self.spread_s = slot.step, time.monotonic() - began
                if failure is None and peers.lost > lost:
                    code = peers.code
                    self._note(f"{peers.lost} of {code.data + code.parity} peers are lost; {code.parity - peers.lost} more may "
                               "go at no cost")  # fmt: skip
                self.changed.notify_all()


CALLS: dict[str, Callable[..., Reply]] = {
    name: getattr(Vault, name) for name in ("hello", "newest", "drop", "open", "begin", "done", "drain", "finish", "status")
}
"""Call -> handler."""


def log(text: str) -> None:
    """A line in keeper.log."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()
