"""A process that is told to end while it starts: at once, with its compilers and their files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from waypost.cli._shared import read_ahead
from waypost.testing.tiny import tiny_checkpoint

PATIENCE_S = 60.0
STARTS = """
import sys
from pathlib import Path

from waypost.kernels import build

build.prebuilt, build.compiler = lambda: None, lambda: sys.argv[1]
build._cache_dir = lambda: Path(sys.argv[2])
"""
COMPILES_AHEAD = """
from waypost.cli._shared import read_ahead

with read_ahead(Path("nothing"), "naive", None):
    build.begin(("pass", "logits"), "bf16", after=("greedy",))
    build.library("pass", "bf16")
"""
COMPILES_NOW = """
from waypost.cli._shared import read_ahead

with read_ahead(Path("nothing"), "naive", None):
    build.library("pass", "bf16")
"""
SERVES = """
from waypost.cli.main import main

main(["serve", *sys.argv[3:]])
"""


class Starting:
    """A process that waits for compilers without end, in a folder of the test's."""

    def __init__(self, folder: Path, code: str, *args: object) -> None:
        self.cache, self._runs, compiler = folder / "cache", folder / "runs", folder / "cc"
        self.cache.mkdir()
        self._runs.mkdir()
        compiler.write_text(f"#!/bin/sh\n: > $TMPDIR/of-the-compiler\n: > {self._runs}/$$\nsleep 600\n")
        compiler.chmod(0o755)
        command = [sys.executable, "-c", STARTS + code, compiler, self.cache, *args]
        self.process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, start_new_session=True)

    def compilers(self) -> list[int]:
        return [int(path.name) for path in self._runs.iterdir()]

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, "it never came to hold"
            time.sleep(0.01)

    def kill(self) -> None:
        for pid in (self.process.pid, *self.compilers()):
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def starting(folder: Path, code: str, *args: object) -> Iterator[Starting]:
    it = Starting(folder, code, *args)
    with it.process:
        try:
            yield it
        finally:
            it.kill()


def ends_with_all(it: Starting, number: signal.Signals) -> str:
    """Sends the signal as a terminal does, to all of the foreground group; what the process then said."""
    os.killpg(it.process.pid, number)
    _, errors = it.process.communicate(timeout=PATIENCE_S)
    assert it.process.returncode == -number
    assert list(it.cache.iterdir()) == []
    it.until(lambda: not any(map(runs, it.compilers())))
    return "".join(line for line in errors.splitlines(keepends=True) if not line.startswith("compiling kernels"))


def runs(pid: int) -> bool:
    """Whether there is such a process, and not only its exit status for a parent to fetch."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(("code", "libraries"), [(COMPILES_AHEAD, 2), (COMPILES_NOW, 1)], ids=["ahead", "now"])
def test_what_waits_for_compilers_ends_with_them(tmp_path: Path, code: str, libraries: int, number: signal.Signals) -> None:
    with starting(tmp_path, code) as it:
        it.until(lambda: len(it.compilers()) >= libraries)
        assert ends_with_all(it, number) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_loads_ends_with_its_compilers(tmp_path: Path, number: signal.Signals) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def loads() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=PATIENCE_S).json()["status"] == "loading"
        except httpx.ConnectError:
            return False

    with starting(tmp_path, SERVES, checkpoint, "--port", port) as it:
        it.until(loads)
        it.until(lambda: len(it.compilers()) >= 2)
        said = ends_with_all(it, number)
    assert [line.split()[0] for line in said.splitlines()] == ["import"]


def test_signals_are_given_back_and_those_that_somebody_ignores_stay_ignored() -> None:
    def ours(*_: object) -> None: ...

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for handler in (signal.SIG_IGN, ours):
            for number in before:
                signal.signal(number, handler)
            with read_ahead(Path("nothing"), "naive", None):
                assert [signal.getsignal(number) for number in before] == [handler] * 3
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with read_ahead(Path("nothing"), "naive", None):
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
