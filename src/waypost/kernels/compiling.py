"""How the C++ sources become a library: the compiler, its flags, and the processors that a wheel brings libraries for.

The standard library alone: setup.py reads this file before anything is installed.
"""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

FAST, QUICK = "-O3", "-O1"
"""To run fast; and to be compiled in two thirds of the time, for a prefill that takes 1.3 times as long. The bits are equal:
sources and flags leave the compiler no order of a sum to choose."""

FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wno-psabi",
)
NATIVE = ("-march=native",)
"""For the processor of this machine."""

ELEMENTS = ("float", "bf16", "double")
"""The element types in C++; a source is compiled once for each that it serves."""
_ROWS = ("float", "bf16")
_Unit = tuple[tuple[str, ...], tuple[str, ...]]
GROUPS: dict[str, tuple[_Unit, ...]] = {
    "pass": (
        (("attention/forward.cpp", "rms_norm/forward.cpp"), ELEMENTS),
        (("layers/layers.cpp", "layers/passes.cpp", "linear/linear.cpp"), _ROWS),
    ),
    "elementwise": ((("rope/rope.cpp", "swiglu/swiglu.cpp"), ELEMENTS),),
    "logits": ((("cross_entropy/cross_entropy.cpp", "draw/draw.cpp", "largest/largest.cpp"), ELEMENTS),),
    "training": ((("attention/backward.cpp", "rms_norm/backward.cpp", "squared_norm/squared_norm.cpp"), ELEMENTS),),
    "quantized": ((("linear/quantized.cpp",), ("bf16",)),),
    "compact": ((("linear/compact.cpp",), ("bf16",)),),
    "int8": ((("linear/int8.cpp",), _ROWS),),
    "greedy": ((("greedy/greedy.cpp",), ("bf16",)),),
    "low_rank": ((("low_rank/low_rank.cpp",), ELEMENTS),),
    "counting": ((("attention/counting.cpp",), ELEMENTS),),
}
"""Units, those together that are used together: sources, and the types that they serve. A group in one element type is a
library, compiled when it is first used. The sources of a unit are compiled as one, for the system's headers alone take half a
second each time; those of "pass" are two units, of about the same length."""

COMPILING = "compiling-"
"""What the folders begin with in which a library is made."""

PREBUILT = Path(__file__).parent / "prebuilt"
"""Where a wheel has the libraries of VARIANTS, NAME.so each."""

_V3 = ("avx2", "fma", "bmi1", "bmi2", "f16c", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
VARIANTS = {
    "avx512bf16": (("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), (*_V4, "avx512_bf16", "avx512_vnni")),
    "avx512": (("-march=x86-64-v4",), _V4),
    "avx2": (("-march=x86-64-v3",), _V3),
}
"""Of x86-64, the best first: name -> (flags of the compiler, what /proc/cpuinfo must list). The tuning is for none of them."""


class CompileError(Exception):
    """What the compiler said."""


def sources(suffix: str = ".cpp") -> tuple[Path, ...]:
    """The C++ files with `suffix`, in one order."""
    return tuple(sorted(Path(__file__).parent.rglob(f"*{suffix}")))


def compiler() -> str | None:
    """Path of the system's C++ compiler, or None."""
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def units(group: str, element: str) -> list[tuple[list[Path], str]]:
    """What a group's library for an element type is compiled from: sources that go together, with the element type."""
    here = Path(__file__).parent
    return [([here / source for source in sources], element) for sources, serves in GROUPS[group] if element in serves]


def compile_library(
    cxx: str, to: Path, units: Sequence[tuple[list[Path], str]], processor: Sequence[str] = NATIVE, *,
    quickly: bool = False, idly: bool = False,
) -> None:  # fmt: skip
    """Compiles `units` for `processor` into the library `to`, which is there as a whole or not at all. CompileError.

    `quickly`: somebody waits for it. `idly`: nobody does, so the processor is left to whoever else wants it, where the system
    has a command for that. `abandon` ends either.
    """
    flags = [QUICK if quickly else FAST, *FLAGS, *processor]
    call = [nice, "-n", "19", cxx] if idly and (nice := shutil.which("nice")) is not None else [cxx]
    folder = Path(tempfile.mkdtemp(prefix=COMPILING, dir=to.parent))
    try:
        objects = [folder / f"{i}.o" for i in range(len(units))]
        commands = []
        for out, (together, element) in zip(objects, units, strict=True):
            text = out.with_suffix(".cpp")
            text.write_text("".join(f'#include "{source}"\n' for source in together))
            commands.append([*call, *flags, f"-DWAYPOST_ELEMENT={element}", "-c", "-o", str(out), str(text)])
        environment = {**os.environ, "TMPDIR": str(folder)}
        _COMPILERS.run(commands, environment, at_once=1 if idly else os.cpu_count() or 1)
        out = folder / to.name
        _COMPILERS.run([[*call, *flags, "-shared", "-o", str(out), *map(str, objects)]], environment, at_once=1)
        with out.open("rb+") as stream:  # on disk before it has its name: a library cut short kills who loads it
            os.fsync(stream.fileno())
        os.replace(out, to)  # another process may have built the same file meanwhile: either one is right
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def whole(path: Path) -> bool:
    """Whether the library at `path` is there to its end: of an ELF file that is where the table of its sections stands."""
    try:
        with path.open("rb") as stream:
            head, size = stream.read(64), os.fstat(stream.fileno()).st_size
    except OSError:
        return False
    if platform.system() != "Linux":
        return size > 0
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    table = int.from_bytes(head[40:48], sys.byteorder)  # e_shoff, e_shentsize and e_shnum of an ELF header of 64 bits
    entry, count = (int.from_bytes(head[at : at + 2], sys.byteorder) for at in (58, 60))
    return table + entry * count <= size


def clear(folder: Path) -> None:
    """Removes what compilations left in `folder` whose process was killed an hour ago or earlier."""
    for left in folder.glob(f"{COMPILING}*"):
        with contextlib.suppress(OSError):  # another process clears too
            if left.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(left, ignore_errors=True)


def compiles_variants() -> bool:
    """Whether this machine is a Linux on x86-64 and has a compiler."""
    return compiler() is not None and (platform.system(), platform.machine()) == ("Linux", "x86_64")


def compile_variants(folder: Path) -> None:
    """Compiles everything into one library for each of VARIANTS in `folder`, where this machine can; half a minute each.
    CompileError, and then there is none: what an earlier build left would not fit these sources."""
    shutil.rmtree(folder, ignore_errors=True)
    cxx = compiler()
    if cxx is None or not compiles_variants():
        return
    everything = [unit for element in ELEMENTS for group in GROUPS for unit in units(group, element)]
    folder.mkdir(parents=True)
    try:
        for name, (flags, _) in VARIANTS.items():
            compile_library(cxx, folder / f"{name}.so", everything, flags)
    except CompileError:
        shutil.rmtree(folder)
        raise


def prebuilt(features: set[str], folder: Path = PREBUILT) -> Path | None:
    """The library in `folder` that serves a processor with `features` best; None where there is none for it."""
    fitting = (folder / f"{name}.so" for name, (_, needs) in VARIANTS.items() if features.issuperset(needs))
    return next((path for path in fitting if path.exists()), None)


class _Compilers:
    """Those that this process runs. No thread waits for them that the interpreter would wait for when it ends."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.RLock()  # `abandon` may be interrupted by a signal that calls it
        self._over = False

    def run(self, commands: Iterable[list[str]], environment: Mapping[str, str], at_once: int) -> None:
        """Runs `commands`, `at_once` at a time. CompileError with what the first of them said that failed, once none of them
        runs any more."""
        begun: collections.deque[subprocess.Popen[str]] = collections.deque()
        try:
            for command in commands:
                if len(begun) == at_once:
                    self._finish(begun.popleft())
                begun.append(self._begin(command, environment))
            while begun:
                self._finish(begun.popleft())
        finally:
            for process in begun:  # another failed, or the waiting was interrupted
                _kill(process)
                with contextlib.suppress(CompileError):
                    self._finish(process)

    def abandon(self) -> None:
        with self._lock:
            self._over = True
            for process in self._running:
                _kill(process)

    def _begin(self, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._over:
                raise CompileError("this process is ending")
            # In a group of its own, for the compiler's driver has children, and Ctrl-C is this process's business; not in a
            # session, of which Linux has each get an equal share of the processor, whatever its priority (sched(7), autogroup).
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                errors="replace", env=environment, process_group=0,
            )  # fmt: skip
            self._running.add(process)
        return process

    def _finish(self, process: subprocess.Popen[str]) -> None:
        try:
            _, errors = process.communicate()
        finally:
            if process.returncode is None:  # interrupted
                _kill(process)
            with self._lock:
                self._running.discard(process)
        if process.returncode != 0:
            raise CompileError(errors[-2000:] or f"the compiler ended with status {process.returncode}")


def _kill(process: subprocess.Popen[str]) -> None:
    if process.returncode is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


_COMPILERS = _Compilers()


def abandon() -> None:
    """Ends what is being compiled, here and from now on: who waits for it gets a CompileError."""
    _COMPILERS.abandon()
