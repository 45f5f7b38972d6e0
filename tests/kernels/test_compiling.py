"""The library of kernels: which one a processor gets, how one is made, and what a wheel needs of it."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
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
    listed = [source for group in compiling.GROUPS.values() for source, _ in group]
    here = Path(compiling.__file__).parent
    assert sorted(listed) == sorted(str(path.relative_to(here)) for path in compiling.sources(".cpp"))
    assert compiling.GROUPS.keys() == call.SIGNATURES.keys()
    exported = {
        group: set(re.findall(r"EXPORT\((\w+)\)\(const|EXPORT\((\w+)\)\(Element|EXPORT\((\w+)\)\(int", text))
        for group, sources in compiling.GROUPS.items()
        for text in ["".join((here / source).read_text() for source, _ in sources)]
    }
    for group, functions in call.SIGNATURES.items():
        assert {name for found in exported[group] for name in found if name} == functions.keys()


@pytest.mark.skipif(compiling.compiler() is None, reason="this machine has no C++ compiler")
def test_a_failed_build_leaves_no_library_of_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.cpp"
    bad.write_text("this is no program")
    (tmp_path / "prebuilt").mkdir()
    (tmp_path / "prebuilt/avx2.so").touch()
    monkeypatch.setattr(compiling, "compiles_variants", lambda: True)
    monkeypatch.setattr(compiling, "units", lambda group, element: [(bad, element)])
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
    compiling.compile_library(cxx, tmp_path / "good.so", [(good, "float")])
    assert ctypes.CDLL(str(tmp_path / "good.so")).seven() == 7
    with pytest.raises(compiling.CompileError, match=r"bad\.cpp"):
        compiling.compile_library(cxx, tmp_path / "both.so", [(good, "float"), (bad, "float")])
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
        build._build(tmp_path / "kernels.so", "pass", "float")
    monkeypatch.setattr(build, "prebuilt", lambda: tmp_path / "avx2.so")
    assert build.available(), "a wheel's library needs no compiler"


def test_a_wheel_is_built_before_anything_is_installed() -> None:
    """setup.py reads the file by itself, in an environment that has setuptools alone."""
    heavy = "sorted({'torch', 'waypost', 'numpy'} & {*sys.modules})"
    code = f"import runpy, sys; runpy.run_path({compiling.__file__!r}); print({heavy})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
