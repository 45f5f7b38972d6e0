"""The libraries of C++ kernels: a wheel's, or what is compiled on first use and cached by source, compiler and processor.

The sources use no framework headers and talk through a C interface (ctypes). They are linked against the OpenMP runtime
that PyTorch has loaded, so that both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from waypost.core.errors import ConfigError
from waypost.core.progress import say
from waypost.kernels import compiling


@functools.cache
def compiler() -> str | None:
    """Path of the system's C++ compiler, or None."""
    return compiling.compiler()


def available() -> bool:
    """Whether there is a library for this machine, or a compiler to make one."""
    return prebuilt() is not None or compiler() is not None


@functools.cache
def prebuilt() -> Path | None:
    """The library that the wheel brought for this processor; None where Waypost runs from its sources."""
    flags = [line.partition(":")[2].split() for line in _cpu().splitlines() if line.startswith("flags")]
    return compiling.prebuilt(set(flags[0])) if flags else None


@functools.cache
def library(group: str, element: str) -> ctypes.CDLL:
    """The kernels of one of compiling.GROUPS for an element type, compiled now if they are not yet on this machine. What failed
    is not tried again: the same error is raised at once."""
    import torch  # loads the OpenMP runtime that ours must resolve to

    del torch
    if (failure := _failed.get((group, element))) is not None:
        raise failure
    begun = _begun.pop((group, element), None)
    try:
        path = prebuilt() or (_file(group, element) if begun is None else begun.result())
    except (ConfigError, OSError) as error:
        _failed[group, element] = error
        raise
    return ctypes.CDLL(str(path))


def begin(groups: Sequence[str], element: str, after: Sequence[str] = ()) -> None:
    """Compiles on threads of their own what of `groups` is not on this machine yet, and then what of `after`, as long as nobody
    else wants the processor; `library` waits for it and raises what went wrong. Worth beginning before PyTorch is imported: a
    compiler leaves the interpreter's lock alone."""
    tried = _begun.keys() | _failed.keys()
    groups, after = ([group for group in which if (group, element) not in tried] for which in (groups, after))
    if prebuilt() is not None or compiler() is None or not (groups or after):
        return
    pool = ThreadPoolExecutor(len(groups) + len(after), "waypost-compiling")
    first = [pool.submit(_file, group, element) for group in groups]
    then = [pool.submit(_file_after, first, group, element) for group in after]
    _begun.update(zip(((group, element) for group in (*groups, *after)), (*first, *then), strict=True))
    pool.shutdown(wait=False)


def _file_after(others: Sequence[Future[Path]], group: str, element: str) -> Path:
    wait(others)
    return _file(group, element, idly=True)


def pending(group: str, element: str) -> bool:
    """Whether `library` would have to wait for what was begun."""
    begun = _begun.get((group, element))
    return begun is not None and not begun.done()


_begun: dict[tuple[str, str], Future[Path]] = {}
_failed: dict[tuple[str, str], ConfigError | OSError] = {}


def _file(group: str, element: str, *, idly: bool = False) -> Path:
    path = _cache_dir() / f"kernels-{_key()}-{group}-{element}.so"
    if not path.exists():
        _build(path, group, element, idly)
    return path


def _cache_dir() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "waypost"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / f"waypost-{os.getuid()}"
        base.mkdir(parents=True, exist_ok=True)
    return base


@functools.cache
def _key() -> str:
    digest = hashlib.blake2b(digest_size=10)
    for path in (*compiling.sources(".cpp"), *compiling.sources(".h")):
        digest.update(path.read_bytes())
    digest.update(" ".join((*compiling.FLAGS, *compiling.NATIVE)).encode())
    digest.update(str(compiler()).encode())
    digest.update(_cpu().encode())
    return digest.hexdigest()


@functools.cache
def _cpu() -> str:
    """What -march=native depends on: the model and the flags of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(line for line in dict.fromkeys(lines) if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return platform.processor()


def require() -> None:
    """ConfigError where there are neither libraries nor a compiler."""
    if not available():
        raise ConfigError("kernel='cpu' needs a C++ compiler: install g++, or choose kernel='naive'")


def _build(path: Path, group: str, element: str, idly: bool) -> None:
    require()
    cxx = compiler()
    assert cxx is not None
    say(f"compiling kernels for this processor, once: {group} in {element}")
    try:
        compiling.compile_library(cxx, path, compiling.units(group, element), idly=idly)
    except (compiling.CompileError, OSError) as error:
        raise ConfigError(
            f"the C++ kernels could not be compiled; choose kernel='naive', and report it if it is our fault:\n{error}"
        ) from error
