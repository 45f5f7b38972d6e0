"""A receipt: what was measured, against what, on which machine, how often, and the command that measures it again."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from waypost.bench import caveat_of
from waypost.bench.figure import Figure, draw
from waypost.bench.roofline import Roofline

PACKAGE = Path(__file__).resolve().parent.parent
"""What is measured: every file of it may change a number."""


@dataclass(frozen=True)
class Options:
    """What every claim takes."""

    model: str | None = None
    """A checkpoint folder to measure on; claims that need a real model say so."""
    repeats: int = 5
    threads: int = 2
    rivals: Mapping[str, str] = field(default_factory=dict)
    """Name of a rival -> folder of the virtual environment that holds it (bench/rivals.py)."""


@dataclass(frozen=True)
class Series:
    """One side of a comparison: the repeats of one number."""

    what: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the range over the median."""
        return (max(self.values) - min(self.values)) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Receipt:
    """One measured claim. `ratio` is `ours` against `baseline`, turned so that above 1 is better for us."""

    claim: str
    statement: str
    """What was compared, in one sentence."""
    numerics: str
    ours: Series
    baseline: Series
    higher_is_better: bool
    floor: float | None
    """The ratio that the claim promises, if any."""
    agreement: str
    """How the outputs were found to agree before anything was timed."""
    command: str
    """What the claim needs of `waypost bench`; `stamped` adds how it was asked."""
    limit: float | None = None
    """The worst that the median of `ours` may be by the claim's promise, in its unit, if it promises that."""
    least: Mapping[str, float] = field(default_factory=dict)
    """Name of an `extra` -> the least that it may be by the claim's promise, for settings that the ratio does not show."""
    over: str = "rounds"
    """What the values of both sides are one each of: rounds, seeds, lengths, texts, settings."""
    caveat: str = ""
    """What a reader must know beside the ratio: a cost, a comparison that is lost, a baseline that is handicapped."""
    extra: Mapping[str, float] = field(default_factory=dict)
    roofline: Roofline | None = None
    """What the machine would allow for `ours`, where that says something."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Rival -> its version."""
    figure: Figure | None = None
    """A picture of it, for what a ratio does not show; drawn beside the receipt."""
    machine: Mapping[str, Any] = field(default_factory=dict)
    when: str = ""
    commit: str = ""

    @property
    def ratio(self) -> float:
        """Median over repeats of the paired ratio: repeat i of both sides was measured next to each other."""
        pairs = zip(self.ours.values, self.baseline.values, strict=True)
        return statistics.median(a / b if self.higher_is_better else b / a for a, b in pairs)

    @property
    def kept(self) -> bool | None:
        """Whether what was promised was reached; None where nothing was promised."""
        if self.floor is None and self.limit is None and not self.least:
            return None
        reached = self.floor is None or self.ratio >= self.floor
        reached = reached and all(self.extra[name] >= bound for name, bound in self.least.items())
        if self.limit is None:
            return reached
        return reached and (self.ours.median >= self.limit if self.higher_is_better else self.ours.median <= self.limit)

    @property
    def promised(self) -> str:
        """What the claim promises, as text; "" for nothing."""
        bound = "at least" if self.higher_is_better else "at most"
        limit = [] if self.limit is None else [f"{bound} {self.limit:g} {self.ours.unit}"]
        least = [f"{name} at least {bound:g}" for name, bound in self.least.items()]
        return " and ".join([*([] if self.floor is None else [f"{self.floor:g}"]), *limit, *least])

    def stamped(self, options: Options) -> Receipt:
        """The receipt with the machine, the date, the commit and the options filled in."""
        return replace(
            self,
            command=self._again(options),
            caveat=caveat_of(self.claim, self.caveat),
            machine=machine_facts(options.threads),
            when=date.today().isoformat(),
            commit=commit(),
        )

    def _again(self, options: Options) -> str:
        """The command that asks for the same once more: each option that is not what it is without being named."""
        usual = Options()
        needed = [f"--rival {name}=ENV" for name in self.versions if name in options.rivals]
        said = [text for text in needed if text not in self.command]
        said += [f"-n {options.repeats}"] if options.repeats != usual.repeats else []
        said += [f"--threads {options.threads}"] if options.threads != usual.threads else []
        return " ".join([self.command, *said])

    def line(self) -> str:
        """One JSON line."""
        tree = {**asdict(self), "ratio": round(self.ratio, 4), "n": len(self.ours.values)}
        tree |= {"kept": self.kept, "promised": self.promised}
        for side in ("ours", "baseline"):
            series: Series = getattr(self, side)
            tree[side] |= {"median": series.median, "spread": round(series.spread, 4)}
        return json.dumps(tree)


class Claim(Protocol):
    """Measures one claim. Asserts that the outputs of both sides agree before timing; alternates the two sides."""

    def measure(self, options: Options) -> Receipt: ...


def machine_facts(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    from waypost.measure.machine import cpu_name

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit(package: Path = PACKAGE) -> str:
    """The commit of the source tree, with "+" where any of the package has changes; "" outside a git checkout."""
    try:
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=package, capture_output=True, text=True, check=True)
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=package, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def append(folder: Path, receipt: Receipt) -> Path:
    """Adds the receipt to <folder>/<claim>.jsonl, and draws its figure, if it has one, as <claim>.svg."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{receipt.claim}.jsonl"
    with path.open("a", encoding="utf-8") as stream:
        stream.write(receipt.line() + "\n")
    if receipt.figure is not None:
        draw(receipt.figure, path.with_suffix(".svg"))
    return path


def latest(folder: Path) -> dict[str, dict[str, Any]]:
    """The newest receipt of each claim, as plain data."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if lines:
            found[path.stem] = json.loads(lines[-1])
    return found


def series(what: str, unit: str, values: Sequence[float]) -> Series:
    """Rounded to six significant digits: more is noise."""
    return Series(what, unit, [float(f"{v:.6g}") for v in values])
