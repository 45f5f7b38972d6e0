"""Who may use the server: API keys, and what each of their holders is entitled to.

A file of keys is a YAML mapping from a holder's name to its key, or to a mapping with further fields:

    alice: sk-alice-7f3a
    nightly: {key: sk-nightly-11b0, weight: 0.5, priority: 10, max_in_flight: 8}
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from pathlib import Path

from waypost.core.config import build, read_yaml, technique
from waypost.core.errors import ConfigError


@technique
class Caller:
    """One holder of a key."""

    name: str = ""
    """How turns are taken and the log names it; never sent to anyone. Empty: no key was asked for."""
    key: str = ""
    weight: float = 1.0
    """Its share of the server while others wait too, in proportion to theirs."""
    priority: int = 0
    """Added to what its requests ask for; lower goes first."""
    max_in_flight: int | None = None
    """Requests that may be answered at once; further ones are refused (429)."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"API key '{self.name}': weight={self.weight}: must be a positive number")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise ConfigError(f"API key '{self.name}': max_in_flight={self.max_in_flight}: must be at least 1")
        if self.name and not (self.key and self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise ConfigError(f"API key '{self.name}': the key must be printable ASCII without spaces, and not empty")


ANYONE = Caller()
"""Who calls a server that asks for no key."""


class Callers:
    """The holders of keys; none: everybody is let in."""

    def __init__(self, callers: list[Caller]) -> None:
        keys = [caller.key for caller in callers]
        twice = next((c.name for c in callers if keys.count(c.key) > 1), None)
        if twice is not None:
            raise ConfigError(f"API key '{twice}' is another holder's key too; give each its own")
        self._callers = [(caller.key.encode(), caller) for caller in callers]

    @classmethod
    def read(cls, path: str | Path) -> Callers:
        """The holders in a file of keys. ConfigError: it cannot be read, names nobody, or a field is wrong."""
        tree = read_yaml(path)
        if not tree:
            raise ConfigError(f"{path}: names no API key; write a line NAME: KEY for each, or leave the option out")
        callers = []
        for name, given in tree.items():
            fields = {"key": given} if isinstance(given, str) else given
            if not isinstance(fields, Mapping):
                raise ConfigError(f"{path}: {name}: {given!r} is no key; write NAME: KEY (in quotes, if it is a number)")
            if "name" in fields:
                raise ConfigError(f"{path}: {name}: unknown key 'name'; the name stands before the colon")
            callers.append(build(Caller, {**fields, "name": str(name)}, f"{path}: {name}"))
        return cls(callers)

    def find(self, authorization: str) -> Caller | None:
        """Who sends this header; None: nobody that is known. Takes as long whichever key matches."""
        if not self._callers:
            return ANYONE
        scheme, _, key = authorization.partition(" ")
        given = key.encode("latin-1", "replace") if scheme.lower() == "bearer" else b""  # no key is empty
        found = None
        for known, caller in self._callers:
            if secrets.compare_digest(given, known):
                found = caller
        return found
