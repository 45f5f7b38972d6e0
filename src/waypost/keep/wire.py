"""How a trainer and its keeper talk: JSON lines over a Unix socket, file descriptors beside them.

    -> {"call": "hello", "protocol": 1, "nonce": "..."}                       first, always
    <- {"ok": {"pid": 4711}}
    -> {"call": "begin", "step": 121, "rank": 0, "due": false, "wait": false, "facts": {"tokens": ..., "scalars": {...}}}
    <- {"ok": {"slot": 1}}                            or {"ok": {"slot": null}}: none is free, leave this step out
    -> {"call": "done", "step": 121, "rank": 0}
    <- {"ok": {"whole": true}}                        or {"error": ["CapacityError", "the disk is full ..."]}

The address is a name in Linux's abstract namespace: it is gone with its process and has no length to run out of. The
file `keeper.json` in the run's folder, readable by its owner alone, holds it beside the nonce; the keeper keeps a lock
on that file for as long as it lives.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from waypost.core import errors
from waypost.core.errors import CheckpointError, WaypostError

PROTOCOL = 1
RECORD = "keeper.json"
LOG = "keeper.log"
MAX_FDS = 64


class Gone(WaypostError):
    """The other side of the connection is not there any more."""


class Line:
    """One connection: sends and receives JSON objects, one a line, with file descriptors beside them."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = b""

    def send(self, tree: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """Sends one JSON line, with open files beside it where given; Gone where the other end is."""
        data = json.dumps(tree).encode() + b"\n"
        try:
            if fds:
                sent = socket.send_fds(self._socket, [data], list(fds))
                data = data[sent:]
            self._socket.sendall(data)
        except OSError as error:
            raise Gone(f"the connection broke: {error}") from error

    def send_bytes(self, data: memoryview) -> None:
        """Sends bytes behind a line."""
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise Gone(f"the connection broke: {error}") from error

    def receive_into(self, data: memoryview) -> None:
        """Fills `data` with what comes behind a line."""
        have = min(len(self._buffer), len(data))
        data[:have], self._buffer, data = self._buffer[:have], self._buffer[have:], data[have:]
        while data:
            try:
                got = self._socket.recv_into(data)
            except OSError as error:
                raise Gone(f"the connection broke: {error}") from error
            if not got:
                raise Gone("the connection was closed")
            data = data[got:]

    def receive(self, limit: int | None = None) -> tuple[dict[str, Any], list[int]]:
        """(object, descriptors); Gone at the end, and where a line grows longer than `limit` bytes or is none."""
        fds: list[int] = []
        while b"\n" not in self._buffer:
            if limit is not None and len(self._buffer) > limit:
                raise Gone("what came is no line of the protocol")
            try:
                data, more, _, _ = socket.recv_fds(self._socket, 1 << 20, MAX_FDS)
            except OSError as error:
                raise Gone(f"the connection broke: {error}") from error
            if not data:
                raise Gone("the connection was closed")
            fds += more
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Gone("what came is no line of the protocol") from error
        if not isinstance(tree, dict):
            raise Gone("what came is no line of the protocol")
        return tree, fds

    def close(self) -> None:
        """Closes the socket: whoever waits on the other end sees Gone."""
        self._socket.close()


def reply_of(tree: dict[str, Any]) -> dict[str, Any]:
    """The content of a reply; raises what the keeper answered with, Gone where it is no reply."""
    match tree:
        case {"error": [str(name), str(message)]}:
            error = getattr(errors, name, None)
            raise (error if isinstance(error, type) and issubclass(error, WaypostError) else CheckpointError)(message)
        case {"ok": dict(reply)}:
            return reply
    raise Gone("what came is no line of the protocol")


def alive(folder: Path) -> bool:
    """Whether a keeper lives in the run's folder: it holds a lock on its record, and only while it lives."""
    try:
        fd = os.open(folder / RECORD, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def read_record(folder: Path) -> dict[str, Any]:
    """The content of keeper.json."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))
