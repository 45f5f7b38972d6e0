"""Strict configuration: frozen pydantic dataclasses built from YAML 1.2, where a wrong key is an error.

A recipe is a dataclass. Its fields are leaves (bool, int, float, str, list, dict, Literal, optional), other recipes, or
a *choice*: `Annotated[Any, Table("optimizer", OPTIMIZERS)]`, written in YAML as a mapping with `name:` and the
technique's own fields. `build` walks the tree itself, so that every error names the full path of the key.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, dataclass_transform

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from waypost.core.errors import ConfigError, nearest
from waypost.core.paths import EMPTY

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def technique(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen, keyword-only, strictly typed dataclass; a wrong or unknown field is a ConfigError.

    A float is finite, unless its type says otherwise: `Annotated[float, pydantic.AllowInfNan(True)]`.
    """
    config = pydantic.ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)
    made: Any = pydantic_dataclass(frozen=True, kw_only=True, config=config)(cls)
    initialise = made.__init__

    @functools.wraps(initialise)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        fields = [f.name for f in dataclasses.fields(made) if f.init]
        for key in values:
            if key not in fields:
                raise ConfigError(f"{cls.__name__}: no field '{key}'.{nearest(key, fields)}")
        try:
            initialise(self, *args, **values)
        except pydantic.ValidationError as error:
            raise ConfigError(_explain(error, cls.__name__)) from error

    made.__init__ = __init__
    return made


def cost(default: Any) -> Any:
    """The default of a field that changes time or memory and never a result; the battery holds its bits to that."""
    return dataclasses.field(default=default, metadata={"effect": "cost"})


recipe = technique
"""A recipe is built and checked exactly as a technique is."""


def _not_empty(path: str) -> str:
    if not path.strip():
        raise PydanticCustomError("empty_path", EMPTY)
    return path


PathText: TypeAlias = Annotated[str, pydantic.AfterValidator(_not_empty)]
"""A field that holds a path or a URL, and never an empty one."""


@dataclass(frozen=True)
class Table:
    """Marks a field whose value is a row of `rows`; a row is a class, or "package.module:Name" where loading is slow."""

    what: str
    rows: Mapping[str, type[Any] | str]

    def resolve(self, name: str) -> type[Any]:
        """The class behind `name`: a row of the table, or an outsider's "package.module:Name"."""
        row = self.rows.get(name, name if ":" in name else None)
        if row is None:
            raise ConfigError(f"{self.what}: no technique named '{name}'.{nearest(name, self.rows)}")
        cls = load_object(row, self.what) if isinstance(row, str) else row
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise ConfigError(f"{self.what}: '{name}' is not a technique; make it one with @technique of waypost.core.config")
        return cls

    def name_of(self, value: object) -> str:
        """The name under which `value` was chosen."""
        here = f"{type(value).__module__}:{type(value).__qualname__}"
        return next((name for name, row in self.rows.items() if row is type(value) or row == here), here)


def load_object(path: str, what: str) -> Any:
    """The object that "package.module:Name" names."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{what}: cannot load '{path}': {error}; write it as package.module:Name") from error


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """`tree` as an instance of the recipe or technique `cls`; errors name the full path of the offending key."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where or cls.__name__}: {tree!r} is not a mapping of fields; known: {_field_names(cls)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{_join(where, str(key))}: unknown key.{nearest(str(key), fields)}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        if not isinstance(error.__cause__, pydantic.ValidationError):
            raise
        raise ConfigError(_explain(error.__cause__, where)) from error.__cause__  # the same, under the key's full path


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Turns mappings into the recipes and techniques that `hint` asks for; leaves are left to pydantic."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        table = next((extra for extra in args[1:] if isinstance(extra, Table)), None)
        return _convert(args[0], value, where) if table is None else _choose(table, value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = [a for a in args if a is not type(None)]
        return _convert(inner[0], value, where) if len(inner) == 1 else value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else build(hint, value, where)
    if origin is list and args and isinstance(value, Sequence) and not isinstance(value, str):
        return [_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and args and isinstance(value, Mapping):
        return {key: _convert(args[1], item, _join(where, str(key))) for key, item in value.items()}
    return value


def _choose(table: Table, value: Any, where: str) -> Any:
    if value is None or not isinstance(value, Mapping | str):
        return value
    tree = {"name": value} if isinstance(value, str) else dict(value)
    name = tree.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{where}: needs 'name', one of: {', '.join(table.rows)}")
    return build(table.resolve(name), tree, where)


def _explain(error: pydantic.ValidationError, where: str) -> str:
    lines = []
    do = {"missing": "; it has no default", "finite_number": "; write one, or leave the field out for its default"}
    for item in error.errors():
        path = where
        for part in item["loc"]:
            path = f"{path}[{part}]" if isinstance(part, int) else _join(path, str(part))
        given = "" if item["type"] in ("missing", "empty_path") else f", given {item['input']!r}"
        lines.append(f"{path}: {item['msg'][:1].lower()}{item['msg'][1:]}{given}{do.get(item['type'], '')}")
    return "; ".join(lines)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _field_names(cls: type[Any]) -> str:
    return ", ".join(f.name for f in dataclasses.fields(cls))


def to_tree(value: Any, hint: Any = None) -> Any:
    """`value` as plain YAML data, with `name` on every choice, so that `build(type(value), to_tree(value)) == value`."""
    if typing.get_origin(hint) is typing.Annotated:
        table = next((extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Table)), None)
        if table is not None and dataclasses.is_dataclass(value):
            return {"name": table.name_of(value), **to_tree(value)}
        return to_tree(value, typing.get_args(hint)[0])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value), include_extras=True)
        return {f.name: to_tree(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(value) if f.init}
    inner = typing.get_args(hint)
    if isinstance(value, list | tuple):
        return [to_tree(item, inner[0] if inner else None) for item in value]
    if isinstance(value, Mapping):
        return {key: to_tree(item, inner[1] if len(inner) == 2 else None) for key, item in value.items()}
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML 1.2 mapping (3e-4 is a number, no is a word). A missing or malformed file is a ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); give the path of a YAML file") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """As `read_yaml`, for text at hand; `where` names it in errors."""
    tree = _parse(text, where)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: holds {type(tree).__name__}, expected a mapping of keys to values")
    return tree


def _parse(text: str, where: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def dump_yaml(tree: Any) -> str:
    """Plain data as YAML text."""
    from ruamel.yaml import YAML

    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 100
    yaml.dump(tree, out)
    return out.getvalue()


def override(tree: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with each `path.to.field=value` of `settings` put in; values are read as YAML, `a.0.b` indexes lists."""
    tree = _copy(tree)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {setting}: write it as path.to.field=value")
        *parents, last = path.split(".")
        node: Any = tree
        for part in parents:
            node = _descend(node, part, setting)
        value = _parse(text, f"--set {setting}")
        if isinstance(node, list):
            node[_index(node, last, setting)] = value
        else:
            node[last] = value
    return tree


def _descend(node: Any, part: str, setting: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, part, setting)]
    if isinstance(node.get(part), str):  # `optimizer: adamw` is short for `optimizer: {name: adamw}`
        node[part] = {"name": node[part]}
    if node.get(part) is None:  # `init: null` is an absent section
        node[part] = {}
    if not isinstance(node[part], dict | list):
        raise ConfigError(f"--set {setting}: '{part}' holds {node[part]!r}, which has no fields")
    return node[part]


def _index(node: list[Any], part: str, setting: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"--set {setting}: '{part}' is not an index of a list of {len(node)}")
    return int(part)


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(item) for item in tree] if isinstance(tree, list) else tree
