"""Every public name says what it is for: shapes, units, errors, source, or whatever else its reader cannot see.

Public are the module-level classes and functions whose names have no underscore, and the methods of those classes. A name
that has been described elsewhere is not described twice, so these need no docstring of their own:

- a technique, which is a whole file: the header with its paper stands on top of it; a claim says at its `measure` what it
  compares;
- an operator, `linear` in kernels/linear/cpu.py: the Protocol in kernels/ops.py, or layers/ops.py, speaks for every twin;
- a method that a contract declares, where it is declared (the Protocol's own docstring speaks for its members) and where
  a class meets the contract, has a documented base that does, or is called by PyTorch (`forward`, `backward`);
- a property of one `return`: name and type are the sentence; and `main`, for which its module's docstring speaks.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator

from waypost.bench.catalogue import PACKAGE

Function = ast.FunctionDef | ast.AsyncFunctionDef

CALLED_BY_TORCH = {"forward", "backward", "setup_context"}
"""Methods whose contract is PyTorch's; the class says what goes in and comes out."""


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Path below the package -> its tree."""
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}


def methods(node: ast.ClassDef) -> dict[str, Function]:
    """The public methods that the class itself defines."""
    return {m.name: m for m in node.body if isinstance(m, Function) and not m.name.startswith("_")}


def names(nodes: list[ast.expr]) -> set[str]:
    """The last part of every name: bases and decorators, called, indexed or bare."""
    bare = [
        node.func if isinstance(node, ast.Call) else node.value if isinstance(node, ast.Subscript) else node for node in nodes
    ]
    return {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in bare}


@functools.cache
def classes() -> dict[str, list[ast.ClassDef]]:
    """Every class of the package by name; a name may stand in several files."""
    found: dict[str, list[ast.ClassDef]] = {}
    for tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


@functools.cache
def contracts() -> list[frozenset[str]]:
    """The members of every documented Protocol of the package."""
    protocols = [node for group in classes().values() for node in group if "Protocol" in names(node.bases)]
    return [frozenset(methods(node)) for node in protocols if ast.get_docstring(node) and methods(node)]


def inherited(node: ast.ClassDef) -> set[str]:
    """Methods that a base in this package, or a base of that, documents or declares."""
    bases = [base for name in names(node.bases) for base in classes().get(name, []) if base is not node]
    return {name for base in bases for name in {*methods(base), *inherited(base)} if ast.get_docstring(base)}


def declared(node: ast.ClassDef) -> set[str]:
    """The methods of a class that a contract speaks for."""
    if "Protocol" in names(node.bases):
        return set(methods(node)) if ast.get_docstring(node) else set()
    mine = set(methods(node))
    met = [members for members in contracts() if members <= mine | inherited(node)]
    return {*inherited(node), *CALLED_BY_TORCH}.union(*met)


FILLERS = {
    "a",
    "an",
    "the",
    "of",
    "and",
    "or",
    "this",
    "its",
    "is",
    "are",
    "to",
    "in",
    "for",
    "return",
    "get",
    "set",
    "whether",
}


def words(text: str) -> set[str]:
    """What is said, in lower case and in the singular: `PageTable`, `page_table` and "page tables" are the same."""
    return {word.lower().rstrip("s") for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", text)}


def is_plain_property(node: Function) -> bool:
    """A property of one `return`."""
    is_property = names(node.decorator_list) & {"property", "cached_property"}
    return bool(is_property) and len(node.body) == 1 and isinstance(node.body[0], ast.Return)


@functools.cache
def operators() -> set[str]:
    """The fields of Ops and AtOnceOps: the operators that are described once for every set."""
    sets = [*classes()["Ops"][0].body, *classes()["AtOnceOps"][0].body]
    return {f.target.id for f in sets if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)}


def is_technique(node: ast.ClassDef, tree: ast.Module) -> bool:
    """Whether the header of its file, or the docstring of its verb, speaks for a technique."""
    header = "\nSource  " in (ast.get_docstring(tree) or "")
    return "technique" in names(node.decorator_list) and (header or any(map(ast.get_docstring, methods(node).values())))


def undocumented(file: str, tree: ast.Module) -> Iterator[str]:
    """Names of `tree` that need a docstring and have none."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        place = f"{file}:{node.lineno}: {node.name}"
        if isinstance(node, Function):
            described = node.name == "main" or (file.startswith("kernels/") and node.name in operators())
            if not described and not ast.get_docstring(node):
                yield place
            continue
        if not ast.get_docstring(node) and not is_technique(node, tree):
            yield place
        silent = [
            name for name, method in methods(node).items() if not ast.get_docstring(method) and not is_plain_property(method)
        ]
        yield from (f"{place}.{name}" for name in silent if name not in declared(node))


def test_every_public_name_has_a_docstring() -> None:
    missing = [line for file, tree in modules().items() for line in undocumented(file, tree)]
    assert not missing, f"{len(missing)} public names say nothing of themselves:\n" + "\n".join(missing)


def test_every_module_says_what_it_holds() -> None:
    missing = [file for file, tree in modules().items() if tree.body and not ast.get_docstring(tree)]
    assert not missing, missing


def test_docstrings_say_more_than_the_name() -> None:
    wrong = []
    for file, tree in modules().items():
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.ClassDef | Function) else None
            if text is not None and not words(text) - words(node.name) - FILLERS:
                wrong.append(f"{file}:{node.lineno}: {node.name}: {text!r}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_are_what_they_say() -> None:
    tree = ast.parse(
        '''
class Silent:
    """Says so."""
    def said(self): "Here."
    def unsaid(self): return 1
    @property
    def obvious(self): return 2
    @property
    def long(self):
        x = 1
        return x
    def forward(self, x): return x
    def _private(self): pass
class Nothing: pass
class _Hidden: pass
def linear(): pass
def described():
    """Yes."""
'''
    )
    assert [line.split(": ")[1] for line in undocumented("x.py", tree)] == ["Silent.unsaid", "Silent.long", "Nothing", "linear"]
    assert [line.split(": ")[1] for line in undocumented("kernels/x/cpu.py", tree)][-1] == "Nothing"
