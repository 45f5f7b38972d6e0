"""Keepers of several machines speak over TCP: the lines of `wire`, bytes behind them, after each has shown that it knows the
run's secret.

    <- {"challenge": C}                                    the keeper, on every new connection
    -> {"challenge": D, "answer": HMAC(secret, "asks" C D)}
    <- {"answer": HMAC(secret, "answers" C D)}             then calls as over a Unix socket; {"ok": {..., "bytes": n}} is
                                                           followed by n bytes

The secret never travels. What follows is neither encrypted nor signed: it is for a network of the run's own machines.
Whoever calls waits ANSWER_S at most for what comes next, and gets Gone with the reason. A keeper waits for calls as long as
the other machine is there; TCP's keepalive asks.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from waypost.core.errors import CheckpointError, ConfigError, WaypostError
from waypost.keep import disk
from waypost.keep.wire import Gone, Line, reply_of

CONNECT_S = 5.0
"""Seconds that a machine may take to accept a connection, and to show that it knows the secret."""
ANSWER_S = 60.0
"""Seconds that it may take to answer a call."""
ASK = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""Seconds of silence before the system asks whether a machine is still there, seconds between two questions, and how many
may stay without an answer; by Linux's names, where keepers live."""
SECRET = "secret"
SECRET_CHARACTERS = 64
MAX_WORD = 4096
"""Bytes that a stranger may send."""

Address = tuple[str, int]


def shared_secret(homes: Path) -> bytes:
    """The run's secret, made if it is not there; a file that its owner alone may read."""
    path = homes / SECRET
    homes.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with contextlib.suppress(FileExistsError):  # two at once have the one that was first
            disk.create_file(path, secrets.token_hex(SECRET_CHARACTERS // 2).encode(), 0o600)
    return read_secret(path)


def read_secret(path: Path) -> bytes:
    """The secret in a file; ConfigError where others may read it, or it is not a whole one."""
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"{path}: others may read the run's secret; chmod 600 it, or remove it")
    secret = path.read_bytes()
    if len(secret) != SECRET_CHARACTERS:
        raise ConfigError(f"{path}: holds {len(secret)} characters, and a run's secret has {SECRET_CHARACTERS}; end the run's "
                          "keepers and remove the file")  # fmt: skip
    return secret


def _answer(secret: bytes, who: str, theirs: str, ours: str) -> str:
    return hmac.new(secret, _bytes(f"{who} {theirs} {ours}"), "sha256").hexdigest()


def _bytes(said: object) -> bytes:
    """What a stranger said, whatever it is."""
    return str(said).encode(errors="replace")


def admit(line: Line, secret: bytes) -> None:
    """The keeper's side of a new connection. CheckpointError, which the other side is told, where the secret is another."""
    challenge = secrets.token_hex(32)
    line.send({"challenge": challenge})
    tree, _ = line.receive(MAX_WORD)
    theirs = str(tree.get("challenge"))
    if not hmac.compare_digest(_bytes(tree.get("answer")), _bytes(_answer(secret, "asks", challenge, theirs))):
        line.send({"error": ["CheckpointError", "another secret than this run's"]})
        raise CheckpointError("somebody with another secret than this run's")
    line.send({"ok": {"answer": _answer(secret, "answers", challenge, theirs)}})


def listen(host: str) -> socket.socket:
    """A socket that listens on an address of this machine, on a port that the system chooses."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.bind((host, 0))
    except OSError as error:
        listener.close()
        raise ConfigError(f"{host}: no address of this machine ({error}); keep.peers.hosts names the machines in the order of "
                          "their ranks") from error  # fmt: skip
    listener.listen()
    return listener


def serve_on(connection: socket.socket) -> None:
    """Sets up a connection on which calls are waited for."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in ASK.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Caller:
    """A connection to the keeper of another machine. Every call raises Gone where it is lost, or too late. May be used by
    several threads."""

    def __init__(self, address: Address, secret: bytes) -> None:
        self.address, self._lock = address, threading.Lock()
        self.name = f"the keeper at {address[0]}:{address[1]}"
        try:
            connection = socket.create_connection(address, CONNECT_S)
        except OSError as error:
            raise Gone(f"{self.name} does not answer: {error}") from error
        self._line = Line(connection)
        weakref.finalize(self, connection.close)
        try:
            theirs, ours = str(self._line.receive(MAX_WORD)[0].get("challenge")), secrets.token_hex(32)
            self._line.send({"challenge": ours, "answer": _answer(secret, "asks", theirs, ours)})
            shown = _bytes(reply_of(self._line.receive(MAX_WORD)[0]).get("answer"))
            if not hmac.compare_digest(shown, _bytes(_answer(secret, "answers", theirs, ours))):
                raise CheckpointError("it does not know the run's secret")
        except WaypostError as error:
            self.close()
            raise Gone(f"{self.name}: {error}") from error
        connection.settimeout(ANSWER_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def call(self, name: str, into: memoryview | None = None, **fields: Any) -> Mapping[str, Any]:
        """One request and its reply; the bytes behind the reply fill `into`."""
        with self._lock:
            try:
                self._line.send({"call": name, **fields})
                reply = reply_of(self._line.receive()[0])
                if into is not None:
                    if reply["bytes"] != len(into):
                        raise CheckpointError(f"{reply['bytes']} bytes came where {len(into)} were asked for")
                    self._line.receive_into(into)
                return reply
            except Gone as error:
                self.close()
                raise Gone(f"{self.name}: {error}") from error

    def close(self) -> None:
        """Leaves; the keeper stays."""
        self._line.close()
