"""The trainer's side of a keeper: finds the one of its run, or starts it, and speaks with it."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.core.errors import CheckpointError, WaypostError
from waypost.core.state import TensorSpec
from waypost.keep.held import Held, Part
from waypost.keep.image import Image, Memory, mapped, specs_of, table_of
from waypost.keep.lineage import Lineage
from waypost.keep.wire import LOG, PROTOCOL, RECORD, Gone, Line, alive, read_record, reply_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gone", "Keeper", "Terms"]

START_S = 30.0
"""Seconds that a keeper may take to come up, and to go down."""


@dataclass(frozen=True)
class Terms:
    """What a trainer agrees on with its keeper before the first snapshot."""

    specs: Sequence[TensorSpec]
    """Every tensor of the state, over all ranks."""
    config: Mapping[str, Any]
    assets: Mapping[str, bytes]
    lineage: Lineage
    session: str
    """A word that this trainer's ranks share and no other trainer's do."""
    at: int
    """The step at which the trainer stands; later snapshots of an earlier trainer are dropped."""
    ranks: int = 1
    copies: int = 2
    """Snapshots that the keeper has memory for: the newest whole one, and those being filled or written to disk."""
    keep_last: int = 3
    keep_every: int | None = None
    remote: Mapping[str, Any] | None = None
    """The remote level: arguments of `copying.store_at`; None where there is none."""
    peers: Mapping[str, Any] | None = None
    """Keepers that hold coded copies: {"folders": [...], "data": k, "parity": m}; None where there are none."""
    machines: Mapping[str, Any] | None = None
    """Where `specs` are one machine's share of a state: what a `machines.Machines` is made of."""
    whole: Sequence[TensorSpec] = ()
    """Every tensor of that state."""

    @property
    def common(self) -> dict[str, Any]:
        """What belongs to every snapshot, as JSON data."""
        assets = {name: base64.b64encode(data).decode() for name, data in self.assets.items()}
        tree = {"config": dict(self.config), "lineage": self.lineage.tree(), "assets": assets}
        return tree | ({"whole": table_of(self.whole)} if self.whole else {})


class Keeper:
    """A connection to the keeper of a run's folder. Every call raises Gone once the keeper is not there any more, and
    the keeper's own errors (a full disk) as they are. May be used by several threads."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        record = read_record(folder)
        self.folder, self.rank, self.pid = folder, rank, int(record["pid"])
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect("\0" + record["address"])
        except OSError as error:
            connection.close()
            raise Gone(f"{folder / RECORD}: the keeper (process {self.pid}) does not answer: {error}") from error
        self._line, self._lock = Line(connection), threading.Lock()
        self.image: Image | None = None
        self.slots: list[Tensor] = []
        self.session = ""
        self.costs: dict[str, float] = {}
        """Seconds that the last write to each level took: disk_s, remote_s, spread_s; those that are known."""
        self.notes: list[str] = []
        """What the keeper wants a person to hear since the last `begin`."""
        try:
            self.call("hello", protocol=PROTOCOL, nonce=record["nonce"])
        except WaypostError:
            self.close()
            raise

    @staticmethod
    def find(folder: Path, rank: int = 0) -> Keeper | None:
        """The living keeper of the folder, if there is one; one that is just ending is waited for."""
        deadline = time.monotonic() + START_S
        while alive(folder):
            try:
                return Keeper(folder, rank)
            except (Gone, FileNotFoundError):  # a process that ends lets go of its socket before its lock
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        return None

    @staticmethod
    def start(folder: Path, idle_s: float, network: Sequence[str | Path] = ()) -> Keeper:
        """A new keeper, in a session of its own; its messages are in keeper.log. `network`: (address of this machine, file of
        the secret) where keepers of other machines shall find it."""
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "waypost.keep.keeper_process", os.path.abspath(folder), str(idle_s), *map(str, network)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        threading.Thread(target=process.wait, daemon=True).start()  # no zombie while this process lives
        with process.stdout:
            if process.stdout.readline() != b"ready\n":
                raise CheckpointError(f"{folder}: the keeper did not start; see {folder / LOG}, or set keep.memory to off")
        return Keeper(folder)

    def call(self, name: str, **fields: Any) -> dict[str, Any]:
        """One request and its reply."""
        return self.exchange(name, fields)[0]

    def exchange(self, name: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """One request, its reply, and the descriptors that came with it, which the caller closes."""
        with self._lock:
            self._line.send({"call": name, **fields})
            tree, fds = self._line.receive()
        return reply_of(tree), fds

    def newest(self, step: int | None = None) -> Held | None:
        """The newest whole snapshot, or the one of `step`; None where there is none."""
        tree, fds = self.exchange("newest", {"step": step})
        if tree["step"] is None:
            return None
        image = Image.of(specs_of(tree["specs"]))
        memory = Memory(fds[0])
        part = Part(image, tree["proofs"], lambda: [memory.read_into], image.itself())
        return Held(tree, (placed.spec for placed in image.places.values()), [part], self.folder)

    def open(self, terms: Terms) -> None:
        """Agrees on the table and maps the memory; every rank calls it with the same terms."""
        image = Image.of(terms.specs)
        fds = self.agree(
            image, session=terms.session, at=terms.at, ranks=terms.ranks, slots=terms.copies, common=terms.common,
            keep_last=terms.keep_last, keep_every=terms.keep_every, remote=terms.remote, peers=terms.peers,
            machines=terms.machines, disk=terms.machines is None,
        )  # fmt: skip
        self.image = image
        self.slots = [mapped(fd, image.num_bytes, writable=True) for fd in fds]
        for fd in fds:
            os.close(fd)

    def agree(self, image: Image, *, session: str, common: Mapping[str, Any], **agreed: Any) -> list[int]:
        """Memory for snapshots of `image`, as descriptors that the caller closes; the fields are those of the call `open`."""
        specs = table_of(placed.spec for placed in image.places.values())
        tree, fds = self.exchange("open", {"session": session, "specs": specs, "common": common, **agreed})
        self.session = session
        if tree["bytes"] != image.num_bytes:
            raise CheckpointError(f"the keeper lays the state out in {tree['bytes']} bytes, the trainer in "
                                  f"{image.num_bytes}; end it with kill {self.pid}")  # fmt: skip
        return fds

    def begin(self, step: int, facts: Mapping[str, Any], *, due: bool, wait: bool, remote: bool = False) -> Tensor | None:
        """Memory to copy step `step` into; None where all is taken and `wait` is not set. `due`: it goes to disk too, with
        `remote` to the remote level as well."""
        fields = {"step": step, "rank": self.rank, "due": due, "wait": wait, "remote": remote, "facts": dict(facts)}
        reply = self.call("begin", session=self.session, **fields)
        self.costs, self.notes = reply["costs"], [*self.notes, *reply["notes"]]
        return None if reply["slot"] is None else self.slots[reply["slot"]]

    def done(self, step: int, proofs: Sequence[Any]) -> None:
        """This rank's share of the step is copied; `proofs` (see `image.Proof`) say what the bytes were."""
        self.call("done", session=self.session, step=step, rank=self.rank, proofs=proofs)

    def close(self) -> None:
        """Leaves; the keeper stays."""
        self.slots = []
        self._line.close()

    def finish(self) -> None:
        """Has everything written to disk, and waits for the keeper's end. Raises what kept the disk from taking it; the
        keeper then stays until its idle limit."""
        self.call("finish")
        self.close()
        deadline = time.monotonic() + START_S
        while alive(self.folder):
            if time.monotonic() > deadline:
                raise CheckpointError(f"{self.folder}: the keeper (process {self.pid}) does not end; see {self.folder / LOG}")
            time.sleep(0.01)
