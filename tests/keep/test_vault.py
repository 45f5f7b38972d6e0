"""What a keeper does with its memory, call by call, without a process around it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from keep_cases import entry

from waypost.core.errors import CapacityError
from waypost.keep import image
from waypost.keep.answers import holdings
from waypost.keep.image import Image, table_of
from waypost.keep.vault import Vault

SPECS = [entry("w", torch.zeros(3, 4)).spec]
AGREED = {"index": 0, "addresses": [["127.0.0.1", 1], ["127.0.0.1", 2]], "parity": 1, "length": 4096, "layout": "one"}
"""Another machine that never answers."""


def opened(vault: Vault, session: str, at: int = 0, **changes: Any) -> None:
    vault.open(session, **{"specs": table_of(SPECS), "slots": 2, "at": at, "common": {}, "disk": False, **changes})


def put(vault: Vault, session: str, step: int) -> None:
    vault.begin(session, step, 0, due=False, wait=False, facts={})
    assert vault.done(session, step, 0, [])[0]["whole"]


def memories() -> int:
    """Memory that this process holds for snapshots and parity."""
    paths = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum("memfd:waypost-snapshot" in os.readlink(path) for path in paths if os.path.lexists(path))


def closed(vault: Vault) -> None:
    if vault.peers is not None:
        vault.peers.close()
    for fd in vault.fds:
        os.close(fd)


def test_what_a_step_that_is_being_spread_was_is_forgotten_too(tmp_path: Path) -> None:
    """A trainer that begins again before it waits until it is read no more."""

    class Spreading(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            slot.spreading = False  # as the other thread does meanwhile
            return True

    vault = Vault(tmp_path)
    opened(vault, "first")
    put(vault, "first", 1)
    put(vault, "first", 2)
    slot = vault.ledger.whole(2)
    assert slot is not None
    slot.spreading, vault.changed = True, Spreading()
    opened(vault, "second", at=1)
    assert vault.newest()[0]["step"] == 1
    closed(vault)


def test_what_is_held_is_told_with_how_many_snapshots_there_is_memory_for(tmp_path: Path) -> None:
    vault = Vault(tmp_path, b"secret")
    assert holdings(vault) == ({"layout": None}, None)
    for slots in (2, 3):
        opened(vault, f"with {slots}", slots=slots, machines=AGREED)
        said = holdings(vault)[0]
        assert (said["slots"], said["steps"], said["index"]) == (slots, [], 0)
    closed(vault)


def test_a_step_that_was_not_spread_is_not_said_to_be(tmp_path: Path) -> None:
    vault = Vault(tmp_path, b"secret")
    vault.start()
    for session in ("first", "second"):
        opened(vault, session, at=1, machines=AGREED)
        if session == "first":
            put(vault, session, 1)
        with vault.changed:
            vault.changed.wait_for(lambda: vault.alone is not None)
        assert "the keeper at 127.0.0.1:2 does not answer" in str(vault.alone)
        assert vault.status()[0]["spread"] == -1
    closed(vault)


@pytest.mark.parametrize("fits", [0, 1, 2, 3])
def test_where_memory_is_short_nothing_is_left_over(fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pieces of memory for snapshots and two for parity are asked for."""
    before, asked, occupy = memories(), [], image.occupy

    def occupied(fd: int, num_bytes: int) -> None:
        asked.append(num_bytes)
        if len(asked) > fits:
            raise CapacityError("a snapshot takes more memory than there is")
        occupy(fd, num_bytes)

    vault = Vault(tmp_path, b"secret")
    with monkeypatch.context() as patch:
        patch.setattr(image, "occupy", occupied)
        with pytest.raises(CapacityError):
            opened(vault, "first", machines=AGREED)
    assert asked == [*[Image.of(SPECS).num_bytes] * 2, 4096, 4096][: fits + 1]
    assert vault.peers is None
    assert memories() == before + len(vault.fds) == before + 2 * (fits > 1)
    opened(vault, "second", machines=AGREED)
    assert memories() == before + 4
    closed(vault)
    assert memories() == before
