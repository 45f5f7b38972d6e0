"""The keeper: a process of its own that owns the snapshots' memory and writes it to disk. `python -m` runs it.

It is in a session of its own, so that no signal to the trainer's group reaches it, and it never maps the memory that it
holds, so that the out-of-memory killer finds the trainer first. It ends when it is told to, or when nobody has been
connected for `idle_s`; in both cases everything is written out first, and its memory goes with it. What it holds and does
is in `vault`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from waypost.core.errors import CheckpointError, ConfigError, WaypostError
from waypost.keep.answers import ANSWERS
from waypost.keep.network import CONNECT_S, admit, listen, read_secret, serve_on
from waypost.keep.vault import CALLS, Vault, log
from waypost.keep.wire import PROTOCOL, RECORD, Gone, Line

REFUSED_S = 1.0
"""Seconds before another connection is accepted where the system refused one."""


class KeeperProcess:
    """One run's keeper: a thread for each connection, around a vault."""

    def __init__(self, folder: Path, idle_s: float, host: str | None = None, secret: bytes = b"") -> None:
        """`host`: an address of this machine at which the keepers of others, who know `secret`, are answered."""
        self.folder, self.idle_s, self.vault = folder, idle_s, Vault(folder, secret)
        self.network = None if host is None else listen(host)

    def run(self) -> None:
        """Listens until the end."""
        address = f"waypost-keeper-{secrets.token_hex(8)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind("\0" + address)
            listener.listen()
            listener.settimeout(0.2)
            signal.signal(signal.SIGTERM, lambda *_: self.vault.end())
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            self.vault.start()
            if self.network is not None:
                threading.Thread(target=self._answer_all, args=(self.network,), daemon=True).start()
            with self._record(address):  # whoever finds it is heard
                sys.stdout.write("ready\n")
                sys.stdout.flush()
                os.dup2(2, 1)
                self._serve(listener)

    def _serve(self, listener: socket.socket) -> None:
        while not self.vault.over(self.idle_s):
            connection = accepted(listener)
            if connection is not None:
                connection.settimeout(None)
                threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    @contextlib.contextmanager
    def _record(self, address: str) -> Iterator[None]:
        """keeper.json: there while the keeper lives, and locked by it."""
        path = self.folder / RECORD
        fresh = path.with_suffix(".tmp")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        facts: dict[str, Any] = {"pid": os.getpid(), "protocol": PROTOCOL, "address": address, "nonce": self.vault.nonce}
        if self.network is not None:
            facts["network"] = self.network.getsockname()[:2]
        os.pwrite(fd, json.dumps(facts).encode() + b"\n", 0)
        os.replace(fresh, path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(fd)

    def _converse(self, connection: socket.socket) -> None:
        line, greeted, session = Line(connection), False, None
        try:
            while True:
                request, _ = line.receive()
                call = request.pop("call", None)
                try:
                    if not greeted and call != "hello":
                        raise ConfigError("the first call must be hello")
                    handler = CALLS.get(str(call))
                    if handler is None:
                        raise ConfigError(f"no call '{call}'; known: {', '.join(CALLS)}")
                    reply, fds = handler(self.vault, **request)
                    greeted = True
                    session = request["session"] if call == "open" else session
                    line.send({"ok": reply}, fds)
                except (WaypostError, OSError, TypeError, KeyError) as error:
                    if isinstance(error, Gone):
                        raise
                    line.send(told(error))
                    if not greeted:
                        return
        except Gone:
            pass
        finally:
            line.close()
            if session is not None:
                self.vault.rank_left(session)

    def _answer_all(self, network: socket.socket) -> None:
        while network.fileno() != -1:
            connection = accepted(network)
            if connection is not None:
                connection.settimeout(CONNECT_S)
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """One connection of another machine: the secret first, then calls of `answers` until it leaves."""
        line = Line(connection)
        try:
            admit(line, self.vault.secret)
            serve_on(connection)
            while True:
                request, _ = line.receive()
                call, data = request.pop("call", None), None
                try:
                    handler = ANSWERS.get(str(call))
                    if handler is None:
                        raise ConfigError(f"no call '{call}'; known: {', '.join(ANSWERS)}")
                    reply, data = handler(self.vault, **request)
                    line.send({"ok": reply})
                except Gone:
                    raise
                except (WaypostError, OSError, TypeError, KeyError) as error:
                    line.send(told(error))
                if data is not None:
                    line.send_bytes(data)
        except (Gone, CheckpointError) as error:
            if isinstance(error, CheckpointError):
                log(f"turned away: {error}")
        finally:
            line.close()


def accepted(listener: socket.socket) -> socket.socket | None:
    """The next connection; None where none came in the listener's time, or the system refused one (too many open files): it
    waits for its turn then."""
    try:
        return listener.accept()[0]
    except TimeoutError:
        return None
    except OSError as error:
        log(f"a connection was not accepted: {error}")
        time.sleep(REFUSED_S)
        return None


def told(error: Exception) -> dict[str, Any]:
    """How a caller is told of an error."""
    return {"error": [type(error).__name__ if isinstance(error, WaypostError) else "CheckpointError", str(error)]}


def main() -> None:
    folder, idle_s, *network = sys.argv[1:]
    os.nice(5)
    host, secret = (network[0], read_secret(Path(network[1]))) if network else (None, b"")
    KeeperProcess(Path(folder), float(idle_s), host, secret).run()


if __name__ == "__main__":
    main()
