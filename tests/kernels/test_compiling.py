"""The library of kernels: which one a processor gets, how one is made, and what a wheel needs of it."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import time
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
        build._build(tmp_path / "kernels.so", "pass", "float", idly=False)
    monkeypatch.setattr(build, "prebuilt", lambda: tmp_path / "avx2.so")
    assert build.available(), "a wheel's library needs no compiler"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The groups that were compiled, by a compiler that takes its time and knows no group "bad"."""
    groups: list[str] = []

    def make(path: Path, group: str, element: str, idly: bool) -> None:
        time.sleep(0.05)
        assert idly == (group == "greedy"), "nobody waits for what comes after"
        if group == "bad":
            raise ConfigError("it does not compile")
        groups.append(group)
        path.touch()

    monkeypatch.setattr(build, "_build", make)
    monkeypatch.setattr(build, "_begun", {})  # what engines of other tests began, and never waited for
    monkeypatch.setattr(build, "_failed", {})
    monkeypatch.setattr(build, "_cache_dir", lambda: tmp_path)
    monkeypatch.setattr(build, "_key", lambda: "it")
    monkeypatch.setattr(build, "prebuilt", lambda: None)
    monkeypatch.setattr(build, "compiler", lambda: "g++")
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Path(path).name)
    return groups


def test_what_was_begun_is_waited_for_and_compiled_once(made: list[str]) -> None:
    build.begin(("pass", "logits"), "bf16")
    load = build.library.__wrapped__  # which keeps nothing
    assert [load(group, "bf16") for group in ("pass", "pass", "logits")] == [
        build._file(group, "bf16").name for group in ("pass", "pass", "logits")
    ]
    assert sorted(made) == ["logits", "pass"]
    build.begin(("pass",), "bf16")
    load("pass", "bf16")
    assert sorted(made) == ["logits", "pass"], "it is on this machine already"


def test_what_comes_after_waits_for_the_rest(made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_begun", {})
    build.begin(("pass", "logits"), "bf16", after=("greedy",))
    assert build.pending("greedy", "bf16")
    assert not build.pending("int8", "bf16"), "which nobody has begun"
    assert build.library.__wrapped__("greedy", "bf16") == build._file("greedy", "bf16").name
    assert made[2:] == ["greedy"]
    assert not build.pending("greedy", "bf16")


@pytest.mark.parametrize("ahead", [True, False])
def test_what_goes_wrong_is_raised_where_it_is_used_and_tried_once(
    made: list[str], ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:
        build.begin(("bad",), "bf16")
    with pytest.raises(ConfigError, match="does not compile"):
        build.library.__wrapped__("bad", "bf16")
    monkeypatch.setattr(build, "_build", lambda *rest: pytest.fail("compiled a second time"))
    build.begin((), "bf16", after=("bad",))
    assert not build.pending("bad", "bf16")
    with pytest.raises(ConfigError, match="does not compile"):
        build.library.__wrapped__("bad", "bf16")
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
