"""Object stores through fsspec: whole objects and ranges of them, with retries. s3://, gs://, abfs://, memory:// ...

An object appears whole or not at all, there is no rename and no writing at an offset; a later write of the same name
replaces it at once.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from waypost.core.errors import CheckpointError, ConfigError
from waypost.core.progress import say

T = TypeVar("T")

TRIES = 5
FIRST_WAIT_S = 0.2
"""Wait before the second try; it doubles each time."""
HOPELESS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What another try does not mend."""
EXTRAS: Mapping[str, str] = {"s3": "s3", "s3a": "s3"}
"""Protocol -> extra of Waypost that brings its library."""

_URL = re.compile(r"([a-z][a-z0-9+]+):/{1,2}(?=[^/])(.+)")


def remote_url(path: object) -> str | None:
    """`path` as the URL of an object store, or None for a path of this machine. pathlib makes s3:/x of s3://x; so both."""
    found = _URL.fullmatch(str(path))
    if found is None or found[1] == "file":
        return None
    return f"{found[1]}://{found[2].rstrip('/')}"


class Remote:
    """A place in an object store. Names are relative to it. Every call raises CheckpointError once its tries are used up."""

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        clean = remote_url(url)
        if clean is None:
            raise ConfigError(f"{url}: no URL of an object store; expected e.g. s3://bucket/run")
        self.url, self.options = clean, dict(options or {})
        protocol = clean.partition(":")[0]
        try:
            import fsspec

            self._fs = fsspec.filesystem(protocol, **self.options)
        except (ImportError, ValueError) as error:
            extra = EXTRAS.get(protocol)
            fix = f'pip install "waypost[{extra}]"' if extra else f"install fsspec and its library for {protocol} ({error})"
            raise ConfigError(f"{url}: {fix}") from error
        self._root = clean.partition("://")[2]

    def at(self, name: str) -> Remote:
        """The place `name` below this one."""
        return Remote(f"{self.url}/{name}", self.options)

    def put(self, name: str, data: bytes | bytearray) -> None:
        """Writes an object; large ones in parts. It appears when it is whole."""
        self._try(f"{self.url}/{name}", lambda: self._fs.pipe_file(self._path(name), bytes(data)))

    def get(self, name: str) -> bytes:
        """A whole object; a missing one is a CheckpointError."""
        return bytes(self._try(f"{self.url}/{name}", lambda: self._fs.cat_file(self._path(name))))

    def range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start .. stop of an object; fewer are a CheckpointError."""
        data = bytes(self._try(f"{self.url}/{name}", lambda: self._fs.cat_file(self._path(name), start=start, end=stop)))
        if len(data) != stop - start:
            raise CheckpointError(f"{self.url}/{name}: ends early: {len(data)} of the {stop - start} bytes from {start} on")
        return data

    def find(self, name: str) -> bytes | None:
        """A whole object, or None where there is none."""
        try:
            return bytes(self._again(f"{self.url}/{name}", lambda: self._fs.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def names(self, below: str = "") -> dict[str, int]:
        """Every object below `below`: name (relative to this place) -> bytes."""
        where = self._path(below)
        found = self._try(f"{self.url}/{below}", lambda: _listed(self._fs, where))
        cut = len(self._root) + 1
        return {path.lstrip("/")[cut:]: int(info.get("size") or 0) for path, info in sorted(found.items())}

    def age_s(self, name: str) -> float:
        """Seconds since an object was written."""
        when = self._try(f"{self.url}/{name}", lambda: self._fs.modified(self._path(name)))
        return time.time() - float(when.timestamp())

    def remove(self, names: list[str]) -> None:
        """Removes objects; what is gone already is no error."""
        for name in names:
            try:
                self._again(f"{self.url}/{name}", lambda name=name: self._fs.rm_file(self._path(name)))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    def unfinished(self) -> list[tuple[str, str, float]]:
        """Uploads in parts that were begun below this place and never finished: (key, id, seconds since)."""
        if not hasattr(self._fs, "call_s3"):
            return []
        bucket, _, prefix = self._root.partition("/")
        answer = self._try(self.url, lambda: self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix + "/"))
        now = time.time()
        return [(u["Key"], u["UploadId"], now - u["Initiated"].timestamp()) for u in answer.get("Uploads", [])]

    def abort(self, key: str, upload: str) -> None:
        """Drops the parts of an unfinished upload."""
        bucket = self._root.partition("/")[0]
        self._try(self.url, lambda: self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, what: str, call: Callable[[], T]) -> T:
        try:
            return self._again(what, call)
        except FileNotFoundError as error:
            raise CheckpointError(f"{what}: missing; the checkpoint is incomplete, or the name is wrong") from error

    def _again(self, what: str, call: Callable[[], T]) -> T:
        """Tries, waits, tries again; FileNotFoundError comes through, the last of other errors as a CheckpointError."""
        fix = "check the name, the rights and the connection"
        for number in range(TRIES):
            try:
                return call()
            except FileNotFoundError:
                raise
            except HOPELESS as error:
                raise CheckpointError(f"{what}: {error}; {fix}") from error
            except Exception as error:
                if number == TRIES - 1:
                    raise CheckpointError(f"{what}: {type(error).__name__}: {error} (tried {TRIES} times); {fix}") from error
                say(f"{what}: {type(error).__name__}: {error}; trying again")
                time.sleep(FIRST_WAIT_S * 2**number)
        raise AssertionError(TRIES)


def _listed(fs: Any, where: str) -> dict[str, dict[str, Any]]:
    fs.invalidate_cache()
    try:
        found: dict[str, dict[str, Any]] = fs.find(where, detail=True)
    except FileNotFoundError:
        return {}
    return found
