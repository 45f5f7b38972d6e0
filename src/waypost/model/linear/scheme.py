"""How a checkpoint's linears are stored in few bits: `quantization_config` of config.json, written and read in one place.

The words are compressed-tensors', which transformers and vLLM read too: "pack-quantized" (whole numbers of 4 or 8 bits,
symmetric, one scale for each group of inputs), and "int-quantized" (8 bits, one scale an output), whose rows are rounded to 8
bits as well, each with a scale of its own. A row's entries that stand out and are not rounded have no word there: the threshold
stands under "waypost", which other readers pass over. Names are those of modules in the folder, without ".weight".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from waypost.core.errors import ConfigError

KEY = "quantization_config"
METHOD, PACKED, INTEGERS, MIXED = "compressed-tensors", "pack-quantized", "int-quantized", "mixed-precision"
BITS = (4, 8)
THRESHOLDS = "outlier_thresholds"
"""Under "waypost" of `quantization_config`: config group -> threshold of Rows8."""


@dataclass(frozen=True)
class Rows8:
    """That what a linear is given is rounded to 8 bits too, row by row, but for entries of at least `threshold` in magnitude;
    None rounds them all."""

    threshold: float | None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0.0 < self.threshold < math.inf:
            raise ConfigError(f"threshold={self.threshold}: must be positive, or null to round every entry")


@dataclass(frozen=True)
class Scheme:
    """How one weight (N, K) is stored: q (N, K) in `bits`, one scale for `group_size` inputs, or for a row where it is None;
    and whether the rows that it meets are rounded as well."""

    bits: int
    group_size: int | None
    rows: Rows8 | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and (self.bits, self.group_size) != (8, None):
            raise ConfigError(
                f"bits={self.bits}, group_size={self.group_size}: rows in 8 bits need weights in 8, one scale a row"
            )
        if self.bits not in BITS:
            raise ConfigError(f"bits={self.bits}: weights are stored in 4 or 8 bits")
        if self.group_size is not None and (self.group_size < 2 or self.group_size % 2):
            raise ConfigError(f"group_size={self.group_size}: must be an even number of inputs, or null for a whole row")

    def group_of(self, inputs: int, name: str = "a weight") -> int:
        """Inputs of a group of a row of `inputs`; ConfigError where they do not divide it."""
        group = inputs if self.group_size is None else self.group_size
        if inputs % group or group % 2:
            near = [n for n in range(2, inputs + 1, 2) if inputs % n == 0]
            raise ConfigError(
                f"group_size={self.group_size} does not divide the {inputs} inputs of {name}; sizes that do: "
                f"{', '.join(map(str, near)) or 'none, keep it as it is'}"
            )
        return group

    @property
    def form(self) -> str:
        """The name of the layout."""
        return PACKED if self.rows is None else INTEGERS

    def weights_tree(self) -> dict[str, Any]:
        """The `weights` of a config group."""
        grouped = {"strategy": "channel"} if self.group_size is None else {"strategy": "group", "group_size": self.group_size}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, **grouped, "dynamic": False}

    def rows_tree(self) -> dict[str, Any] | None:
        """The `input_activations` of a config group."""
        if self.rows is None:
            return None
        return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def to_config(schemes: Mapping[str, Scheme], plain: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder in which the linears `schemes` are quantised and the linears `plain` are not."""
    kinds = list(dict.fromkeys(schemes.values()))
    groups: dict[str, Any] = {}
    thresholds: dict[str, float] = {}
    for kind in kinds:
        mine = [name for name, scheme in schemes.items() if scheme == kind]
        targets = ["Linear"] if len(kinds) == 1 else _targets(mine, {*schemes} - {*mine})
        if kind.rows is not None and kind.rows.threshold is not None:
            thresholds[f"group_{len(groups)}"] = kind.rows.threshold
        groups[f"group_{len(groups)}"] = {
            "targets": targets, "weights": kind.weights_tree(), "input_activations": kind.rows_tree(),
            "output_activations": None, "format": kind.form,
        }  # fmt: skip
    forms = {kind.form for kind in kinds}
    return {
        "quant_method": METHOD, "format": forms.pop() if len(forms) == 1 else MIXED, "quantization_status": "compressed",
        "config_groups": groups, "ignore": sorted(plain), "kv_cache_scheme": None, "global_compression_ratio": None,
        **({"waypost": {THRESHOLDS: thresholds}} if thresholds else {}),
    }  # fmt: skip


def _targets(mine: Sequence[str], others: Set[str]) -> list[str]:
    """What matches the linears `mine`, and no other module: a linear in two groups would get a mixture of both."""
    leaves = sorted({name.rpartition(".")[2] for name in mine})
    if leaves and {name.rpartition(".")[2] for name in others}.isdisjoint(leaves):
        return [f"re:(.*[.])?({'|'.join(map(re.escape, leaves))})$"]
    return list(mine)


@dataclass(frozen=True)
class Layout:
    """The schemes of a folder, by the names of its linears."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    """(targets, scheme): a target is a name, "re:" and an expression that matches its beginning, or a module's class."""

    def of(self, name: str) -> Scheme:
        """The scheme of the linear `name`; a name goes before an expression, an expression before a class."""
        for matches in (lambda t: t == name, lambda t: t[:3] == "re:" and re.match(t[3:], name), lambda t: t == "Linear"):
            for targets, scheme in self.groups:
                if any(matches(target) for target in targets):
                    return scheme
        raise ConfigError(f"{KEY}: no config group speaks of '{name}', which is stored packed")


def from_config(tree: Mapping[str, Any]) -> Layout:
    """What config.json `tree` says of its packed weights; ConfigError for what is not read here, or belongs to nothing."""
    given = _mapping(tree[KEY], KEY)
    method, form = given.get("quant_method"), given.get("format")
    if method != METHOD or form not in (PACKED, INTEGERS, MIXED):
        raise ConfigError(
            f"{KEY}: {method!r} in format {form!r} is not read here; read are compressed-tensors' pack-quantized and "
            "int-quantized, or take the folder with full weights"
        )
    ours = _mapping(given.get("waypost"), f"{KEY}.waypost")
    thresholds = _mapping(ours.get(THRESHOLDS), f"{KEY}.waypost.{THRESHOLDS}")
    found, rounded = [], set()
    for name, group in _mapping(given.get("config_groups"), f"{KEY}.config_groups").items():
        where = f"{KEY}.config_groups.{name}"
        group = {**_mapping(group, where)}
        scheme = _read(where, {**group, "format": group.get("format") or form}, thresholds.get(name))
        found.append((_read_targets(where, group.get("targets", ())), scheme))
        if scheme.rows is not None:
            rounded.add(name)
    over = [*(ours.keys() - {THRESHOLDS}), *(f"{THRESHOLDS}.{name}" for name in thresholds.keys() - rounded)]
    if over:
        raise ConfigError(
            f"{KEY}.waypost.{min(over)}: belongs to no config group whose rows are rounded "
            f"({', '.join(sorted(rounded)) or 'there is none'}); without it the model would compute something else"
        )
    return Layout(tuple(found))


def _read(where: str, group: Mapping[str, Any], threshold: object) -> Scheme:
    weights, rows = (_mapping(group.get(key), f"{where}.{key}") for key in ("weights", "input_activations"))
    if weights.get("type") != "int" or not weights.get("symmetric", True) or weights.get("actorder") not in (None, "static"):
        raise ConfigError(f"{where}: read are symmetric whole numbers in the order of the inputs, given {dict(weights)}")
    kind = [rows.get(key) for key in ("num_bits", "type", "symmetric", "strategy", "dynamic")] if rows else None
    if rows and kind != [8, "int", True, "token", True]:
        raise ConfigError(
            f"{where}: quantised activations are read in 8 bits, symmetric, dynamic and by token, given {dict(rows)}"
        )
    strategy, bits, size = (weights.get(key) for key in ("strategy", "num_bits", "group_size"))
    if strategy not in ("group", "channel") or type(bits) is not int or bits not in BITS:
        raise ConfigError(f"{where}: strategy={strategy!r}, num_bits={bits!r}: read are group and channel, in 4 and 8 bits")
    if strategy == "group" and type(size) is not int:
        raise ConfigError(f"{where}: group_size={size!r}: must be a whole number of inputs")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise ConfigError(f"{where}: its outlier threshold is {threshold!r}, and must be a number")
    scheme = Scheme(bits, size if strategy == "group" else None, Rows8(threshold) if rows else None)
    if group["format"] != scheme.form:
        raise ConfigError(f"{where}: format={group['format']!r} is not read for these weights, which {scheme.form} would hold")
    return scheme


def _read_targets(where: str, given: object) -> tuple[str, ...]:
    """The targets of a group; an expression among them is one."""
    targets = tuple(given) if isinstance(given, list | tuple) else (given,)
    for target in targets:
        try:
            re.compile(target[3:] if target[:3] == "re:" else "")
        except (TypeError, re.error) as error:
            raise ConfigError(f"{where}: target {target!r} is neither a name nor re: and an expression ({error})") from error
    return targets


def _mapping(given: object, where: str) -> Mapping[str, Any]:
    """`given`, or nothing where it is null."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{where}: must be a mapping of names to values, given {given!r}")
    return given or {}
