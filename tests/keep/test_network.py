"""Keepers that speak over TCP, in this process: who is let in, what strangers may say, and that every wait ends."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from waypost.core.errors import CheckpointError, ConfigError
from waypost.keep import disk, keeper_process, network
from waypost.keep.keeper_process import KeeperProcess
from waypost.keep.network import Address, Caller, shared_secret
from waypost.keep.wire import Gone, Line


class Listener:
    """One that ends the loop that accepts from it after as many connections as it was made for; before each, the system
    refuses one."""

    def __init__(self, real: socket.socket, connections: int = 1) -> None:
        self.real, self.left, self.refused = real, connections, 0
        self.accepted: list[socket.socket] = []

    def fileno(self) -> int:
        return -1 if self.left == 0 else self.real.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refused == len(self.accepted):
            self.refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        self.left -= 1
        self.accepted.append(self.real.accept()[0])
        return self.accepted[-1], None


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KeeperProcess]:
    monkeypatch.setattr(keeper_process, "REFUSED_S", 0.0)
    keeper = KeeperProcess(tmp_path, 60.0, "127.0.0.1", b"secret")
    yield keeper
    assert keeper.network is not None
    keeper.network.close()


def answered(process: KeeperProcess, connections: int = 1) -> tuple[Address, Listener]:
    """The address at which a keeper now answers so many connections."""
    assert process.network is not None
    listener: Any = Listener(process.network, connections)
    threading.Thread(target=process._answer_all, args=(listener,), daemon=True).start()
    return process.network.getsockname(), listener


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense\n", b"[]\n", b"3\n", b"[" * 4000 + b"\n", b"x" * 5000, b"{}\n", b'{"challenge": "00", "answer": "00"}\n',
        b'{"challenge": "\\u00e9", "answer": "\\u00e9"}\n', b'{"challenge": "\\ud800", "answer": "\\ud800"}\n',
    ],
    ids=range(9),
)  # fmt: skip
def test_whoever_does_not_know_the_secret_is_turned_away(line: bytes, process: KeeperProcess) -> None:
    with socket.create_connection(answered(process)[0], 5) as stranger:
        stranger.sendall(line)
        told = Line(stranger)
        assert "challenge" in told.receive()[0]
        answers = json.dumps(told.receive()[0]) if line.startswith(b"{") else ""
        assert line[:1] != b"{" or "another secret than this run's" in answers
        with pytest.raises(Gone):
            told.receive()


def test_whoever_knows_the_secret_is_answered_as_long_as_it_is_there(process: KeeperProcess) -> None:
    """Whether it still is, the system asks; a connection that was refused costs that one alone."""
    address, listener = answered(process, connections=2)
    with pytest.raises(Gone, match=r"127\.0\.0\.1:\d+: another secret than this run's"):
        Caller(address, b"guess")
    caller = Caller(address, b"secret")
    with pytest.raises(ConfigError, match="no call 'steal'"):
        caller.call("steal")
    with pytest.raises(CheckpointError, match="no whole snapshot of step 7 here"):
        caller.call("part", step=7)
    serving = listener.accepted[1]
    assert (serving.gettimeout(), listener.refused) == (None, 2)
    assert serving.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    assert [serving.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [60, 10, 6]
    caller.close()


def test_a_connection_that_the_system_refuses_does_not_end_the_keeper(process: KeeperProcess) -> None:
    assert process.network is not None
    listener: Any = Listener(process.network)
    process.vault.over = lambda idle_s: listener.left == 0  # type: ignore[method-assign]
    with socket.create_connection(process.network.getsockname(), 5) as trainer:
        process._serve(listener)
        line = Line(trainer)
        line.send({"call": "begin"})
        assert line.receive()[0] == {"error": ["ConfigError", "the first call must be hello"]}
    assert listener.refused == 1


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"ok": {"answer": "00"}}, "does not know the run's secret"),
        ({"ok": {"answer": "\u00e9\ud800"}}, "does not know the run's secret"),
        ({"ok": 3}, "no line of the protocol"),
        ({}, "no line of the protocol"),
        ({"error": "no"}, "no line of the protocol"),
        ({"error": ["difflib", "what"]}, "what"),
        ({"error": ["ConfigError", "what"]}, "what"),
    ],
)
def test_a_keeper_that_lies_about_the_secret_is_not_believed(said: dict[str, Any], message: str) -> None:
    with network.listen("127.0.0.1") as liar:

        def answer() -> None:
            line = Line(liar.accept()[0])
            line.send({"challenge": "00"})
            line.receive()
            line.send(said)
            line.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Gone, match=message):
            Caller(liar.getsockname(), b"secret")


def test_waits_end_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "CONNECT_S", 0.1)
    with network.listen("127.0.0.1") as silent, pytest.raises(Gone, match=r"the keeper at 127\.0\.0\.1:\d+: .*timed out"):
        Caller(silent.getsockname(), b"secret")
    with pytest.raises(Gone, match="does not answer"):
        Caller(("127.0.0.1", 1), b"secret")
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1: no address of this machine"):
        network.listen("192.0.2.1")


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    secret = shared_secret(tmp_path / "homes")
    assert len(secret) == 64
    assert shared_secret(tmp_path / "homes") == secret
    path = tmp_path / "homes" / network.SECRET
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="others may read the run's secret"):
        shared_secret(tmp_path / "homes")


@pytest.mark.parametrize("written", [b"", b"0" * 63, b"0" * 65])
def test_half_a_secret_is_none(written: bytes, tmp_path: Path) -> None:
    """Whoever knows the path would know that one."""
    path = tmp_path / network.SECRET
    path.write_bytes(written)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"holds {len(written)} characters, and a run's secret has 64; end the"):
        shared_secret(tmp_path)


def test_a_secret_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(disk, "pwrite_all", die)
        with pytest.raises(KeyboardInterrupt):
            shared_secret(tmp_path)
    assert not (tmp_path / network.SECRET).exists()

    def another_first(size: int) -> str:
        (tmp_path / network.SECRET).write_bytes(b"a" * 64)
        (tmp_path / network.SECRET).chmod(0o600)
        return "b" * 2 * size

    monkeypatch.setattr(network.secrets, "token_hex", another_first)
    assert shared_secret(tmp_path) == b"a" * 64
