"""The libraries of C++ kernels: a wheel's, or what is compiled on first use and cached by source, compiler and processor.

The sources use no framework headers and talk through a C interface (ctypes). They are linked against the OpenMP runtime
that PyTorch has loaded, so that both share one pool of threads.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path

from waypost.core.errors import ConfigError
from waypost.core.progress import say
from waypost.kernels import compiling

CLEARING_S = 2.0
"""The longest that a process waits when it ends for threads that clear away what their compilers wrote."""


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


def library(group: str, element: str) -> ctypes.CDLL:
    """The kernels of one of compiling.GROUPS for an element type, compiled now if they are not yet on this machine. What failed
    is not tried again: the same error is raised at once. What was compiled quickly gives way to what runs fast: `improved`."""
    import torch  # loads the OpenMP runtime that ours must resolve to

    del torch
    which = group, element
    if (loaded := _loaded.get(which)) is not None:
        return loaded
    if (failure := _failed.get(which)) is not None:
        raise type(failure)(*failure.args)  # a new one, for each raising adds frames, with all that they hold, to an error
    begun = None
    try:
        path = prebuilt()
        if path is None:
            begun = _compiled(group, element)
            path = begun.result()
        with _loading:
            if which not in _loaded:
                _loaded[which] = ctypes.CDLL(str(_better.get(which, path)))
    except Exception as error:
        _failed[which] = type(error)(*error.args)
        raise
    finally:
        if begun is not None and begun.done():  # not where the waiting was interrupted
            _begun.pop(which, None)
    return _loaded[which]


def _compiled(group: str, element: str) -> Future[Path]:
    """What was begun, or begins now: never in the thread of the caller, which a signal may interrupt anywhere."""
    with _loading:
        begun = _begun.get((group, element))
        if begun is None:
            begun = _begun[group, element] = Future()
            if compiling.whole(path := _path(group, element)):
                begun.set_result(path)
            else:
                _start(functools.partial(_fulfil, begun, _file, group, element))
    return begun


def _start(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, name="waypost-compiling", daemon=True)
    thread.start()
    _threads.append(thread)  # only now, for a signal may come in between, and `leave` joins them
    atexit.unregister(leave)
    atexit.register(leave)


def begin(groups: Sequence[str], element: str, after: Sequence[str] = ()) -> None:
    """Compiles on threads of their own what of `groups` is not on this machine yet, quickly, for `library` waits for it; then
    the same to run fast, and `after`, while nobody else wants the processor and this process lives. `library` raises what
    went wrong. Worth beginning before PyTorch is imported: a compiler leaves the interpreter's lock alone."""
    tried = _begun.keys() | _failed.keys() | _loaded.keys()
    groups, after = ([group for group in which if (group, element) not in tried] for which in (groups, after))
    if prebuilt() is not None or compiler() is None or not (groups or after):
        return
    first: dict[str, Future[Path]] = {group: Future() for group in groups}
    then: dict[str, Future[Path]] = {group: Future() for group in after}
    _begun.update({(group, element): future for group, future in (first | then).items()})
    works = [functools.partial(_fulfil, future, _soon, group, element) for group, future in first.items()]
    works.append(functools.partial(_idly, first, then, element))
    for work in works:
        _start(work)


def _fulfil(future: Future[Path], work: Callable[..., Path], *args: object, **how: bool) -> None:
    try:
        future.set_result(work(*args, **how))
    except Exception as error:  # whatever it is belongs to who waits for the library
        future.set_exception(error)


def _soon(group: str, element: str) -> Path:
    """A library that runs: the fast one where it is there, else one that is compiled quickly."""
    path = _path(group, element)
    return path if compiling.whole(path) else _file(group, element, quickly=True)


def _idly(groups: dict[str, Future[Path]], after: dict[str, Future[Path]], element: str) -> None:
    wait(groups.values())
    quick = [g for g, path in groups.items() if path.exception() is None and path.result() != _path(g, element)]
    for group in quick[:1]:  # which is worth most; then what spares some passes work
        _improve(group, element)
    for group, path in after.items():
        _fulfil(path, _file, group, element, idly=True)
    for group in quick[1:]:
        _improve(group, element)


def _improve(group: str, element: str) -> None:
    """Puts the library that runs fast in the place of the one that was compiled quickly; without it, that one serves on."""
    try:
        path = _file(group, element, idly=True)
        with _loading:
            _better[group, element] = path
            if (group, element) in _loaded:
                _loaded[group, element] = ctypes.CDLL(str(path))
    except Exception as error:
        if not _leaving:
            say(f"kernels that were compiled quickly serve on, {group} in {element}: {error}")
        return
    for renew in improved:
        renew(group, element)


def leave() -> None:
    """Ends what is being compiled, for the process ends: who waits for it gets a ConfigError. Done by itself when the
    interpreter ends, not by a signal."""
    global _leaving
    _leaving = True
    compiling.abandon()
    until = time.monotonic() + CLEARING_S
    for thread in _threads:  # they clear away what they began
        thread.join(max(0.0, until - time.monotonic()))


def pending(group: str, element: str) -> bool:
    """Whether `library` would have to wait for what was begun."""
    begun = _begun.get((group, element))
    return begun is not None and not begun.done()


improved: list[Callable[[str, str], None]] = []
"""Called with a group and an element type once `library` has a faster one of them, by a thread of its own."""

_begun: dict[tuple[str, str], Future[Path]] = {}
_failed: dict[tuple[str, str], Exception] = {}
_loaded: dict[tuple[str, str], ctypes.CDLL] = {}
_better: dict[tuple[str, str], Path] = {}
_loading = threading.Lock()
_threads: list[threading.Thread] = []
_leaving = False


def _path(group: str, element: str, *, quickly: bool = False) -> Path:
    return _cache_dir() / f"kernels-{_key()}-{group}-{element}{'-quick' if quickly else ''}.so"


def _file(group: str, element: str, *, quickly: bool = False, idly: bool = False) -> Path:
    path = _path(group, element, quickly=quickly)
    if not compiling.whole(path):
        _build(path, group, element, quickly=quickly, idly=idly)
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
    digest.update(" ".join((compiling.FAST, compiling.QUICK, *compiling.FLAGS, *compiling.NATIVE)).encode())
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


def _build(path: Path, group: str, element: str, *, quickly: bool, idly: bool) -> None:
    require()
    cxx = compiler()
    assert cxx is not None
    compiling.clear(path.parent)
    if not idly:
        rest = "; what runs faster follows in the background" if quickly else ""
        say(f"compiling kernels for this processor, once: {group} in {element}{rest}")
    try:
        compiling.compile_library(cxx, path, compiling.units(group, element), quickly=quickly, idly=idly)
    except compiling.CompileError as error:
        raise ConfigError(
            f"the C++ kernels could not be compiled; choose kernel='naive', and report it if it is our fault:\n{error}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the C++ kernels could not be compiled in {path.parent}: {error.strerror}; make room there, or set XDG_CACHE_HOME "
            "to a folder that can be written"
        ) from error
