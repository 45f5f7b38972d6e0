"""The catalogue: every technique and every receipt, as tables, read from the sources themselves.

`python -m waypost.bench.catalogue` writes docs/catalogue.md and the receipts between the markers of README.md; a test
holds that both are current. Nothing is imported to find a technique: a table is a module-level constant annotated
`Mapping[str, type...]`, and the six lines on top of a technique's file say what the catalogue shows.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waypost.bench import TRIED
from waypost.bench.receipt import latest
from waypost.bench.table import comparison, markdown
from waypost.core.errors import ConfigError

KEYS = ("Source", "Equation", "Shapes", "Acts on", "Differs", "Exact")
"""The six lines, in this order, each begun at the margin and continued under its text."""

INDENT = 10
BEGIN, END = "<!-- receipts -->", "<!-- /receipts -->"
PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Header:
    """The docstring on top of a technique's file."""

    summary: str
    """Its first sentence."""
    lines: dict[str, str]
    """Key -> text, continuation lines joined by a space."""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    name: str
    cls: str
    path: Path
    """The file that defines the class."""


@dataclass(frozen=True)
class Point:
    """One extension point: a folder with a literal table."""

    folder: str
    """Relative to the package, with slashes."""
    table: str
    module: str
    what: str
    """The first line of the folder's docstring."""
    rows: tuple[Row, ...]


def read_header(path: Path) -> Header:
    """The header of a technique's file. ConfigError: a line is missing, empty, out of order or not of the six."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=True) or ""
    head, _, body = text.partition("\n\n")
    lines: dict[str, str] = {}
    for line in body.splitlines():
        if not line.strip():
            break
        if line[0] != " ":
            lines[line[:INDENT].strip()] = line[INDENT:].strip()
        elif lines and line[:INDENT].strip() == "":
            lines[next(reversed(lines))] += " " + line.strip()
    if tuple(lines) != KEYS or not all(lines.values()):
        raise ConfigError(
            f"{path}: its docstring must have the lines {', '.join(KEYS)}, in this order after an empty line, each with its "
            f"text from column {INDENT + 1}; found: {', '.join(lines) or 'none'}"
        )
    return Header(" ".join(head.split()), lines)


def scan(package: Path = PACKAGE) -> list[Point]:
    """Every extension point of the package, ordered by folder."""
    points = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, value in _tables(tree):
            what = (ast.get_docstring(tree) or "").splitlines()
            module = _module(path, package)
            folder = path.parent.relative_to(package).as_posix()
            rows = tuple(_rows(tree, value, path, package))
            points.append(Point(folder, name, module, what[0] if what else "", rows))
    return points


def technique_files(point: Point, package: Path = PACKAGE) -> list[Path]:
    """The files of a point's folder that must each have a row: all but those whose name begins with an underscore."""
    return sorted(path for path in (package / point.folder).glob("*.py") if not path.name.startswith("_"))


def unlisted(points: list[Point], package: Path = PACKAGE) -> list[tuple[Path, Header]]:
    """Files with a header that are not a row of any table: parts that are always there, so that nobody chooses them."""
    rows = {row.path for point in points for row in point.rows}
    found = []
    for path in sorted(package.rglob("*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if path not in rows and all(f"\n{key:<{INDENT}}" in text for key in KEYS):
            found.append((path, read_header(path)))
    return found


def _tables(tree: ast.Module) -> Iterator[tuple[str, ast.Dict]]:
    for node in tree.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Dict)):
            continue
        if ast.unparse(node.annotation).startswith("Mapping[str, type"):
            yield node.target.id, node.value


def _rows(tree: ast.Module, table: ast.Dict, path: Path, package: Path) -> Iterator[Row]:
    homes = {
        alias.asname or alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    for key, value in zip(table.keys, table.values, strict=True):
        if not (isinstance(key, ast.Constant) and isinstance(key.value, str)):
            raise ConfigError(f"{path}: a table's names are literal strings, found {ast.unparse(key) if key else '**'}")
        if isinstance(value, ast.Constant):
            module, _, cls = str(value.value).partition(":")
        else:
            cls = ast.unparse(value)
            module = homes.get(cls, _module(path, package))
        yield Row(key.value, cls, package.parent / (module.replace(".", "/") + ".py"))


def _module(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def catalogue(points: list[Point], receipts: Path, package: Path = PACKAGE) -> str:
    """The text of docs/catalogue.md."""
    parts = [
        "# The catalogue",
        "",
        "Every technique and every measured claim, written from the sources by `python -m waypost.bench.catalogue`. *Exact*",
        "says when a technique is the plain thing, or what holds of it to the bit. Under a table stands what was measured",
        "of its techniques, each against its own baseline: median, +- half the range over it, the median of the rounds' ratios",
        "with the least and the most of them (above 1 is better), what was promised of the ratio, what was measured beside it,",
        "in the units that the names end with, and what to give `waypost bench CLAIM` to measure it again.",
        "",
    ]
    known = latest(receipts)
    for point in points:
        parts += [f"## {point.folder}", "", point.what, "", f"Table `{point.table}` of `{point.module}`.", ""]
        parts += _table_lines([(row.name, row.path, read_header(row.path)) for row in point.rows], package)
        parts += _measured_lines(point, known)
    parts += ["## Parts that are always there", "", "With a source of their own, and no alternative to choose.", ""]
    parts += _table_lines([(path.stem, path, header) for path, header in unlisted(points, package)], package)
    return "\n".join([*parts, "## Claims about the whole", "", receipt_lines(receipts), ""])


def _measured_lines(point: Point, known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The receipts of a point's techniques."""
    here = {claim: receipt for claim, receipt in known.items() if TRIED.get(claim, "").rpartition("/")[0] == point.folder}
    return [comparison(here), ""] if here else []


def _table_lines(rows: list[tuple[str, Path, Header]], package: Path) -> list[str]:
    lines = ["| name | what it is | source | exact |", "| --- | --- | --- | --- |"]
    for name, path, header in rows:
        link = f"[`{name}`](../src/{path.relative_to(package.parent).as_posix()})"
        cells = (link, header.summary, header.lines["Source"], header.lines["Exact"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def receipt_lines(receipts: Path) -> str:
    """The newest receipts of claims about the whole as a table, or the sentence that there are none."""
    known = {claim: receipt for claim, receipt in latest(receipts).items() if claim not in TRIED}
    return markdown(known) if known else "None yet: `waypost bench` lists the claims, `waypost bench NAME --save` measures one."


def with_receipts(readme: str, receipts: Path) -> str:
    """`readme` with the newest receipts between its markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"README.md: needs a line '{BEGIN}' and after it a line '{END}'; the receipts go between them")
    return f"{head}{BEGIN}\n{receipt_lines(receipts)}\n{END}{tail}"


def write(root: Path) -> list[Path]:
    """Brings the documents of the source tree `root` up to date; the paths of those that changed."""
    receipts, readme = root / "benchmarks" / "receipts", root / "README.md"
    texts = {root / "docs" / "catalogue.md": catalogue(scan(), receipts)}
    if readme.is_file():
        texts[readme] = with_receipts(readme.read_text(encoding="utf-8"), receipts)
    stale = {path: text for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(stale)


if __name__ == "__main__":
    changed = write(PACKAGE.parent.parent)
    print("\n".join(f"wrote {path.name}" for path in changed) or "everything is current")
