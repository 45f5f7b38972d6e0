"""The library of kernels: which one a processor gets, how one is made, and what a wheel needs of it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from waypost.core.errors import ConfigError
from waypost.kernels import build, call, compiling


def features_of(*names: str) -> set[str]:
    return {"sse2"}.union(*(compiling.VARIANTS[name][1] for name in names))


def test_a_processor_gets_the_best_library_that_it_can_run(tmp_path: Path) -> None:
    assert compiling.prebuilt(features_of("avx512bf16"), tmp_path) is None, "no wheel brought any"
    for name in ("avx2", "avx512", "avx512bf16"):
        (tmp_path / f"{name}.so").touch()
        for wider in ("avx512bf16", "avx512", "avx2"):
            found = compiling.prebuilt(features_of(wider), tmp_path)
            runs = set(compiling.VARIANTS[name][1]) <= features_of(wider)
            assert found is not None
            assert (found.stem == name) == runs
    assert compiling.prebuilt({"sse2"}, tmp_path) is None


def test_every_source_is_in_one_group_and_every_group_says_what_it_exports() -> None:
    listed = [source for group in compiling.GROUPS.values() for sources, _ in group for source in sources]
    here = Path(compiling.__file__).parent
    assert sorted(listed) == sorted(str(path.relative_to(here)) for path in compiling.sources(".cpp"))
    assert compiling.GROUPS.keys() == call.SIGNATURES.keys()
    exported = {
        group: set(re.findall(r"EXPORT\((\w+)\)\((?:const|Element|int|Turn|\))", text))
        for group, units in compiling.GROUPS.items()
        for text in ["".join((here / source).read_text() for sources, _ in units for source in sources)]
    }
    for group, functions in call.SIGNATURES.items():
        assert exported[group] == functions.keys()


@pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")
def test_a_failed_build_leaves_no_library_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.cpp"
    bad.write_text("this is no program")
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt/avx2.so").touch()
    monkeypatch.setattr(compiling, "compiles_variants", lambda: True)
    monkeypatch.setattr(compiling, "units", lambda group, element: [([bad], element)])
    with pytest.raises(compiling.CompileError):
        compiling.compile_variants(tmp_path / "prebuilt")
    assert not (tmp_path / "prebuilt").exists()


@pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")
def test_a_library_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.cpp", tmp_path / "bad.cpp"
    good.write_text('extern "C" int seven() { return 7; }')
    bad.write_text("this is no program")
    cxx = compiling.compiler()
    assert cxx is not None
    compiling.compile_library(cxx, tmp_path / "good.so", [([good], "float")])
    assert ctypes.CDLL(str(tmp_path / "good.so")).seven() == 7
    compiling.compile_library(cxx, tmp_path / "idle.so", [([good], "float")], idly=True)
    assert ctypes.CDLL(str(tmp_path / "idle.so")).seven() == 7
    (tmp_path / "idle.so").unlink()
    with pytest.raises(compiling.CompileError, match=r"bad\.cpp"):
        compiling.compile_library(cxx, tmp_path / "both.so", [([good], "float"), ([bad], "float")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.cpp", "good.cpp", "good.so"]


def test_without_compiler_and_library_the_plain_kernels_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from waypost.kernels import select

    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "prebuilt", lambda: None)
    assert not build.available()
    assert select().name == "naive"
    with pytest.raises(ConfigError, match="install g\\+\\+, or choose kernel='naive'"):
        select(kernel="cpu")
    with pytest.raises(ConfigError, match="install g\\+\\+"):
        build._build(tmp_path / "kernels.so", "pass", "float", quickly=False, idly=False)
    monkeypatch.setattr(build, "prebuilt", lambda: tmp_path / "avx2.so")
    assert build.available(), "a wheel's library needs no compiler"


@pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")
def test_a_library_that_was_cut_short_is_made_again(tmp_path: Path) -> None:
    """As a machine that lost its power may leave it; to load it is a bus error."""
    source, library = tmp_path / "seven.cpp", tmp_path / "seven.so"
    source.write_text('extern "C" int seven() { return 7; }')
    cxx = compiling.compiler()
    assert cxx is not None
    assert not compiling.whole(library)
    compiling.compile_library(cxx, library, [([source], "float")])
    assert compiling.whole(library)
    raw = library.read_bytes()
    for size in (0, 10, 64, 1000, len(raw) // 2, len(raw) - 1):
        library.write_bytes(raw[:size])
        assert not compiling.whole(library), size


@pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")
def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "kernels.so"
    with pytest.raises(ConfigError, match=r"gone: No such file or directory; make room there, or set XDG_CACHE_HOME"):
        build._build(gone, "pass", "float", quickly=False, idly=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What was compiled, by a compiler that takes its time and knows no group "bad"."""
    idle()  # it would go on in what is put in the place of its functions
    done: list[str] = []

    def make(path: Path, group: str, element: str, *, quickly: bool, idly: bool) -> None:
        time.sleep(0.05)
        if group == "bad":
            raise ConfigError("it does not compile")
        done.append(f"{group}{' quickly' if quickly else ''}{' idly' if idly else ''}")
        path.touch()

    monkeypatch.setattr(build, "_build", make)
    monkeypatch.setattr(compiling, "whole", Path.exists)
    for what in ("_begun", "_failed", "_loaded", "_better"):
        monkeypatch.setattr(build, what, {})  # what engines of other tests began, and never waited for
    monkeypatch.setattr(build, "_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "_key", lambda: "it")
    monkeypatch.setattr(build, "prebuilt", lambda: None)
    monkeypatch.setattr(build, "compiler", lambda: "g++")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Path(path).name)
    yield done
    idle()


def idle() -> None:
    """Waits until nothing is compiled in the background any more."""
    for thread in threading.enumerate():
        if thread.name == "waypost-compiling":
            thread.join()


def loaded(group: str) -> str:
    return str(build.library(group, "bf16"))


def name(group: str, *, quickly: bool = False) -> str:
    return build._path(group, "bf16", quickly=quickly).name


def test_who_waits_gets_what_was_compiled_quickly_and_then_what_runs_fast(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, seen = {group: threading.Event() for group in ("pass", "logits")}, []
    monkeypatch.setattr(build, "improved", [lambda group, element: (seen.append((group, element)), fast[group].set())])
    make, both_loaded = build._build, threading.Event()

    def make_when_both_are_loaded(path: Path, group: str, element: str, *, quickly: bool, idly: bool) -> None:
        assert not idly or both_loaded.wait(60)
        make(path, group, element, quickly=quickly, idly=idly)

    monkeypatch.setattr(build, "_build", make_when_both_are_loaded)
    build.begin(("pass", "logits"), "bf16", after=("greedy",))
    assert build.pending("greedy", "bf16")
    assert not build.pending("int8", "bf16"), "which nobody has begun"
    assert [loaded(group) for group in ("pass", "logits", "pass")] == [
        name(group, quickly=True) for group in ("pass", "logits", "pass")
    ]
    both_loaded.set()
    assert loaded("greedy") == name("greedy")
    assert not build.pending("greedy", "bf16")
    assert all(event.wait(60) for event in fast.values())
    assert seen == [("pass", "bf16"), ("logits", "bf16")]
    assert [loaded(group) for group in ("pass", "logits")] == [name("pass"), name("logits")]
    assert sorted(made[:2]) == ["logits quickly", "pass quickly"]
    assert made[2:] == ["pass idly", "greedy idly", "logits idly"]


def test_what_runs_fast_is_taken_where_it_is_there(made: list[str]) -> None:
    assert loaded("int8") == name("int8")
    assert made == ["int8"], "nobody began it, so it is compiled once, to run fast"
    build._path("pass", "bf16").touch()
    build._path("logits", "bf16", quickly=True).touch()  # an earlier process did that
    build.begin(("pass", "logits"), "bf16")
    assert loaded("pass") == name("pass")
    idle()
    assert loaded("logits") == name("logits"), "whether it was loaded before or comes in time"
    assert made[1:] == ["logits idly"]


def test_without_what_runs_fast_what_was_compiled_quickly_serves_on(
    made: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = build._build

    def fail_idly(path: Path, group: str, element: str, *, quickly: bool, idly: bool) -> None:
        if idly:
            raise ValueError("nobody expected that")
        make(path, group, element, quickly=quickly, idly=idly)

    monkeypatch.setattr(build, "_build", fail_idly)
    build.begin(("pass",), "bf16", after=("greedy",))
    idle()
    assert loaded("pass") == name("pass", quickly=True)
    assert "serve on, pass in bf16: nobody expected that" in capsys.readouterr().err
    assert not build.pending("greedy", "bf16")
    with pytest.raises(ValueError, match="nobody expected that"):
        loaded("greedy")
    assert made == ["pass quickly"]


def test_functions_are_asked_for_anew_once_there_are_faster_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Function:
        argtypes: list[object]
        restype: object

    class Library:
        def __init__(self) -> None:
            self.waypost_linear_bf16, self.waypost_greedy_bf16 = Function(), Function()

    libraries = {"pass": Library(), "greedy": Library()}
    asked: list[str] = []

    def library(group: str, element: str) -> Library:
        asked.append(group)
        return libraries[group]

    monkeypatch.setattr(call, "library", library)
    kernels = call.Kernels("bf16")
    first, other = kernels.linear, kernels.greedy
    assert first is libraries["pass"].waypost_linear_bf16
    assert kernels.__dict__["linear"] is first, "looked up once"
    libraries["pass"] = Library()
    monkeypatch.setattr(call, "_KERNELS", {0: call.Kernels("float"), 1: kernels})
    call._renew("pass", "bf16")
    assert kernels.linear is libraries["pass"].waypost_linear_bf16
    assert kernels.greedy is other

    def faster_meanwhile(group: str, element: str) -> Library:
        asked.append(group)
        return libraries[group] if len(asked) % 2 else Library()

    asked.clear()
    monkeypatch.setattr(call, "library", faster_meanwhile)
    kernels.renew("pass")
    assert kernels.linear is libraries["pass"].waypost_linear_bf16
    assert "linear" not in kernels.__dict__, "the next call looks again"


ENDS = """
import sys
from pathlib import Path

from waypost.kernels import build

build.prebuilt, build.compiler = lambda: None, lambda: sys.argv[1]
build._cache_dir = lambda: Path(sys.argv[2])
build.begin((), "bf16", after=("greedy",))
while not Path(sys.argv[3]).exists():
    pass
print("over")
"""


def test_a_process_does_not_wait_for_what_it_compiles_idly(tmp_path: Path) -> None:
    cache, compiler, runs = tmp_path / "cache", tmp_path / "cc", tmp_path / "runs"
    cache.mkdir()
    # Like a compiler's driver it has a child, and puts its own files where TMPDIR says.
    compiler.write_text(f"#!/bin/sh\n: > $TMPDIR/of-the-compiler\necho $$ > {runs}.new && mv {runs}.new {runs}\nsleep 600\n")
    compiler.chmod(0o755)
    command = [sys.executable, "-c", ENDS, str(compiler), str(cache), str(runs)]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    assert (done.stdout, done.stderr) == ("over\n", "")
    assert list(temporary.iterdir()) == []
    assert list(cache.iterdir()) == [], "nor does it leave anything behind"
    with pytest.raises(ProcessLookupError):
        os.kill(int(runs.read_text()), 0)


@pytest.mark.parametrize("ahead", [True, False])
def test_what_goes_wrong_is_raised_where_it_is_used_and_tried_once(
    made: list[str], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:
        build.begin(("bad",), "bf16")
    with pytest.raises(ConfigError, match="does not compile") as first:
        loaded("bad")
    monkeypatch.setattr(build, "_build", lambda *rest, **how: pytest.fail("compiled a second time"))
    build.begin((), "bf16", after=("bad",))
    assert not build.pending("bad", "bf16")
    for _ in range(3):
        with pytest.raises(ConfigError, match="does not compile") as again:
            loaded("bad")
        assert again.value is not first.value, "an error that is kept keeps what stands in the frames that it went through"
        assert len(again.traceback) <= len(first.traceback)
    assert not made


def test_a_wheels_library_or_no_compiler_leave_nothing_to_begin(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_begun", {})
    for name, found in (("prebuilt", Path("avx2.so")), ("compiler", None)):
        with monkeypatch.context() as here:
            here.setattr(build, name, lambda found=found: found)
            build.begin(("pass",), "bf16")
    assert not build._begun
    assert not made


def test_a_wheel_is_built_before_anything_is_installed() -> None:
    """setup.py reads the file by itself, in an environment that has setuptools alone."""
    heavy = "sorted({'torch', 'waypost', 'numpy'} & {*sys.modules})"
    code = f"import runpy, sys; runpy.run_path({compiling.__file__!r}); print({heavy})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
