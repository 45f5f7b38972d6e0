"""Durable file operations: the only place of `keep` that changes a disk.

Everything goes through the names `os.<call>` of this module, so that a test can stop the program at any one of them.
Folders appear by rename and vanish by rename first, so that a name either holds a complete folder or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from waypost.core.errors import CapacityError, CheckpointError, WaypostError
from waypost.keep import linux

UNFINISHED = re.compile(r"\.(tmp|old)-[0-9a-f]+$")
"""Tail of a folder that is being written or removed (tmp), or that was moved aside to be replaced (old)."""


def nonce() -> str:
    """Eight random hex digits."""
    return secrets.token_hex(4)


def pwrite_all(fd: int, data: memoryview | bytes, offset: int) -> None:
    """Writes all of `data` at `offset`, however many calls the system takes for it."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def write_file(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Creates or overwrites `path` and makes its bytes durable; the folder is left to `sync_folder`."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        pwrite_all(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Puts `data` in the place of `path` at once and durably: a reader sees the old bytes or the new ones."""
    fresh = path.with_name(f"{path.name}.tmp-{nonce()}")
    try:
        write_file(fresh, data)
        os.replace(fresh, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
        raise
    sync_folder(path.parent)


def create_file(path: Path, data: bytes, mode: int) -> None:
    """Puts `data` at `path` at once and durably; FileExistsError, and nothing is changed, where something is there."""
    fresh = path.with_name(f"{path.name}.tmp-{nonce()}")
    try:
        write_file(fresh, data, mode)
        os.link(fresh, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(fresh)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync(fd: int) -> None:
    """Makes the bytes of an open file durable."""
    os.fsync(fd)


def make_folder(path: Path) -> None:
    """Creates a folder that is not there yet."""
    os.mkdir(path)


def make_parents(path: Path) -> None:
    """Creates the folders that lead to `path`, durably."""
    missing = [parent for parent in path.parents if not parent.exists()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        sync_folder(parent.parent)


def open_file(path: Path, flags: int) -> int:
    """A file descriptor of `path`, to be closed by the caller."""
    return os.open(path, flags, 0o644)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor of `path`, closed at the end."""
    fd = os.open(path, flags, 0o644)
    try:
        yield fd
    finally:
        os.close(fd)


def allocate(path: Path, header: bytes, num_bytes: int) -> None:
    """Creates a file of its final size that begins with `header`; its room on the disk is reserved where that is possible."""
    with opened(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
        os.ftruncate(fd, num_bytes)
        linux.reserve(fd, num_bytes)
        pwrite_all(fd, header, 0)
        os.fsync(fd)


def publish(fresh: Path, final: Path, replace: bool) -> None:
    """Renames the complete folder `fresh` to `final`; with `replace`, a checkpoint that is there makes room.

    A failure puts the old folder back; a crash in between leaves it as `<final>.old-<nonce>`, and `recover` does.
    """
    aside = None
    if occupied(final):
        if not replace:
            raise CheckpointError(f"{final} exists already; name another folder or remove it")
        if not (final / "waypost.json").is_file():
            raise CheckpointError(f"{final} is in the way and no checkpoint of Waypost, so it is not replaced; move it")
        aside = final.with_name(f"{final.name}.old-{nonce()}")
        os.rename(final, aside)
    try:
        if aside is not None:
            sync_folder(final.parent)
        os.rename(fresh, final)
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    sync_folder(final.parent)
    if aside is not None:
        remove_tree(aside)


def occupied(path: Path) -> bool:
    """Whether something is at `path`; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def discard(folder: Path) -> None:
    """Removes a folder so that its name never stands for half of it."""
    doomed = folder.with_name(f"{folder.name}.tmp-{nonce()}")
    os.rename(folder, doomed)
    sync_folder(folder.parent)
    remove_tree(doomed)


def remove_file(path: Path) -> None:
    """Removes one file. Here because every change of the disk goes by this module, where tests make it fail."""
    os.unlink(path)


def remove_tree(folder: Path) -> None:
    """Removes a folder and all that is in it; links are removed, not followed."""
    for entry in sorted(folder.iterdir()):
        if stat.S_ISDIR(entry.lstat().st_mode):
            remove_tree(entry)
        else:
            os.unlink(entry)
    os.rmdir(folder)


def recover(parent: Path, name: str, keep: str | None = None) -> None:
    """Clears what a crash left of saves to `parent/name`: puts a folder back that was moved aside, removes torn ones.

    `keep` is the full name of an unfinished folder that somebody goes on with.
    """
    if not parent.is_dir():
        return
    left = [p for p in sorted(parent.iterdir()) if UNFINISHED.sub("", p.name) == name != p.name and p.name != keep]
    for path in left:
        if UNFINISHED.search(path.name)[1] == "old" and not occupied(parent / name):  # type: ignore[index]
            os.rename(path, parent / name)
            sync_folder(parent)
        elif path.is_dir():
            remove_tree(path)
        else:
            os.unlink(path)


def moved_aside(final: Path) -> Path | None:
    """The folder that a crash left beside `final` while it was being replaced, if `final` itself is not there."""
    if final.exists() or not final.parent.is_dir():
        return None
    beside = (p for p in sorted(final.parent.iterdir()) if p.name.startswith(f"{final.name}.old-"))
    return next((p for p in beside if UNFINISHED.sub("", p.name) == final.name), None)


def require_space(path: str | Path, num_bytes: int) -> None:
    """Raises CapacityError, with the numbers, if the disk of `path` (which need not exist yet) has less room."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if free < num_bytes:
        raise CapacityError(
            f"{path}: needs {human(num_bytes)} of disk and {human(free)} are free; free some space, keep fewer "
            "checkpoints, or write to another disk"
        )


def human(num_bytes: float) -> str:
    """A size for people: 1.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def explain(error: OSError, path: Path) -> WaypostError:
    """A failed call of the system as an error of Waypost."""
    what = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            what += f", {human(shutil.disk_usage(path.parent).free)} free"
        return CapacityError(
            f"{path}: the disk is full ({what}); nothing that was complete has been touched. Free some space, keep fewer "
            "checkpoints, or write to another disk, then run the same command again"
        )
    return CheckpointError(f"{error.filename or path}: {what}; check the path, its permissions and the disk")
