"""The catalogue is read from the sources: what it finds, what it refuses, what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from waypost.bench import CLAIMS, TRIED
from waypost.bench.catalogue import (
    BEGIN,
    END,
    PACKAGE,
    catalogue,
    receipt_lines,
    scan,
    technique_files,
    unlisted,
    with_receipts,
)
from waypost.bench.receipt import Receipt, append, latest, series
from waypost.core.errors import ConfigError

HEADER = '''"""{what}

Source    Someone 1999, A paper | with a bar
Equation  y = x
Shapes    (n,) -> (n,)
Acts on   everything
Differs   nothing
Exact     always
"""
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one point with two rows, one of them lazy, and a part that is always there."""
    package = tmp_path / "house"
    (package / "tools").mkdir(parents=True)
    (package / "tools" / "__init__.py").write_text(
        '"""Tools: what does the work.\n\nMore."""\n\nfrom house.tools.saw import Saw\n\n'
        'OTHER: dict[str, int] = {"a": 1}\nTOOLS: Mapping[str, type[Tool] | str] = {"saw": Saw, "axe": "house.tools.axe:Axe"}\n'
    )
    for name in ("saw", "axe", "_shared"):
        (package / "tools" / f"{name}.py").write_text(HEADER.format(what=f"The {name}: it\ncuts."))
    (package / "floor.py").write_text(HEADER.format(what="The floor."))
    return package


def test_points_and_rows_are_found_without_importing(package: Path) -> None:
    (point,) = scan(package)
    assert (point.folder, point.table, point.module, point.what) == (
        "tools",
        "TOOLS",
        "house.tools",
        "Tools: what does the work.",
    )
    assert [(row.name, row.cls, row.path.name) for row in point.rows] == [("saw", "Saw", "saw.py"), ("axe", "Axe", "axe.py")]
    assert [path.name for path in technique_files(point, package)] == ["axe.py", "saw.py"]
    assert {path.name for path, _ in unlisted([point], package)} == {"floor.py", "_shared.py"}


def test_the_catalogue_has_a_line_for_each(package: Path, tmp_path: Path) -> None:
    text = catalogue(scan(package), tmp_path / "no receipts", package)
    row = "| [`saw`](../src/house/tools/saw.py) | The saw: it cuts. | Someone 1999, A paper \\| with a bar | always |"
    assert row in text.splitlines()
    assert "| [`floor`](../src/house/floor.py) | The floor. |" in text
    assert "None yet" in text


def test_a_table_of_names_that_are_computed_is_refused(package: Path) -> None:
    (package / "tools" / "__init__.py").write_text("TOOLS: Mapping[str, type] = {NAME: Saw}\n")
    with pytest.raises(ConfigError, match="literal strings, found NAME"):
        scan(package)


def test_receipts_go_between_the_markers(tmp_path: Path) -> None:
    facts = {"numerics": "exact", "higher_is_better": True, "agreement": "equal", "command": "waypost bench cut"}
    ours, base = series("saw", "cuts/s", [30.0, 33.0]), series("knife", "cuts/s", [10.0, 11.0])
    append(tmp_path, Receipt("cut", "a saw against a knife", ours=ours, baseline=base, floor=2.0, **facts))  # type: ignore[arg-type]
    lines = receipt_lines(tmp_path).splitlines()
    row = "31.5 cuts/s +-5% | knife: 10.5 cuts/s +-5% | **3.00** (3.00 to 3.00) | 2, kept | - | - |"
    assert f"| `cut` | a saw against a knife | {row}" in lines
    readme = f"# A\n{BEGIN}\nold\n{END}\nB\n"
    new = with_receipts(readme, tmp_path)
    assert new == f"# A\n{BEGIN}\n" + "\n".join(lines) + f"\n{END}\nB\n"
    assert with_receipts(new, tmp_path) == new
    for damaged in ("# A\n", f"{BEGIN}\n", f"{END}\n{BEGIN}\n"):
        with pytest.raises(ConfigError, match="needs a line"):
            with_receipts(damaged, tmp_path)


def test_the_house_is_larger_than_nothing() -> None:
    assert len(scan()) >= 14
    assert PACKAGE.name == "waypost"


def test_what_was_tried_stands_under_its_table(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("waypost.bench.catalogue.TRIED", {"tools.saw": "tools/saw"})
    facts = {"numerics": "exact", "floor": None, "agreement": "equal", "command": "waypost bench tools.saw"}
    ours, base = series("saw", "s", [3.0, 1.0, 4.0]), series("axe", "s", [2.0, 2.0, 2.0])
    append(
        tmp_path,
        Receipt("tools.saw", "a saw", ours=ours, baseline=base, higher_is_better=False, extra={"teeth_n": 9.0}, **facts),  # type: ignore[arg-type]
    )
    head, _, tail = catalogue(scan(package), tmp_path, package).partition("## Claims about the whole")
    assert (
        "| `tools.saw` | a saw | saw: 3 s +-50%; axe: 2 s +-0%; ratio **0.667** (0.500 to 2.00) | - | worse in 2 of 3 "
        "| teeth_n 9 | - |" in head.splitlines()
    )
    assert "tools.saw" not in tail


def test_every_technique_that_was_tried_is_one() -> None:
    rows = {row.path.relative_to(PACKAGE).with_suffix("").as_posix() for point in scan() for row in point.rows}
    assert set(TRIED) <= set(CLAIMS)
    assert set(TRIED.values()) <= rows


def test_every_promise_that_was_missed_is_printed_as_missed() -> None:
    root = PACKAGE.parent.parent
    known = latest(root / "benchmarks" / "receipts")
    missed = {claim for claim, receipt in known.items() if receipt.get("kept") is False}
    assert missed, "a house in which every promise is kept has promised too little"
    lines = catalogue(scan(), root / "benchmarks" / "receipts").splitlines()
    assert {claim for claim in missed for line in lines if line.startswith(f"| `{claim}` |") and ", missed" in line} == missed
