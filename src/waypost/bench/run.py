"""Measuring several claims: one after another, and past those that cannot be measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from waypost.bench import CLAIMS
from waypost.bench.receipt import Claim, Options, Receipt, append
from waypost.core.config import Table
from waypost.core.errors import WaypostError
from waypost.core.progress import say


@dataclass
class Outcome:
    """What came of measuring several claims."""

    receipts: list[Receipt] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Claim -> why it was not measured."""


def chosen(name: str | None) -> list[str]:
    """The claim `name`, or every claim of the family, or all for None. ConfigError for a name that is neither."""
    if name is None:
        return list(CLAIMS)
    family = [claim for claim in CLAIMS if claim == name or claim.startswith(f"{name}.")]
    if not family:
        Table("bench", CLAIMS).resolve(name)
        return [name]
    return family


def measure_all(names: Sequence[str], options: Options, receipts: Path | None) -> Outcome:
    """Measures each claim; a receipt is written as soon as it is there. Whatever goes wrong with one of several, a
    rival's crash included, is kept as its reason and the next one goes on; what goes wrong with the only one is raised."""
    outcome = Outcome()
    for number, name in enumerate(names, 1):
        if len(names) > 1:
            say(f"[{number}/{len(names)}] {name}")
        began = time.monotonic()
        try:
            claim: Claim = Table("bench", CLAIMS).resolve(name)()
            receipt = claim.measure(options).stamped(options)
        except Exception as error:
            if len(names) == 1:
                raise
            outcome.failed[name] = f"{type(error).__name__}: {error}"
            say(f"{name}: not measured. {outcome.failed[name]}")
            continue
        outcome.receipts.append(receipt)
        if receipts is not None:
            append(receipts, receipt)
        kept = {None: "", True: ", kept", False: ", NOT kept"}[receipt.kept]
        say(f"{name}: ratio {receipt.ratio:.2f}{kept}, in {time.monotonic() - began:.0f} s")
    return outcome


def outcome_error(outcome: Outcome) -> WaypostError:
    """What says which claims were not measured, and why."""
    return WaypostError(
        f"{len(outcome.failed)} of {len(outcome.failed) + len(outcome.receipts)} claims were not measured:\n"
        + "\n".join(f"  {name}: {why}" for name, why in outcome.failed.items())
    )
