"""Laws: what follows from the size of a model and of its data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from waypost.plan.laws.step_law import StepLaw


@dataclass(frozen=True)
class Scale:
    """The size of a run, in numbers alone."""

    parameters: float
    """Without embedding and head."""
    tokens: float
    """Seen in the whole run."""


@dataclass(frozen=True)
class Run:
    """A run to learn a law from: its size, and what was measured of it or found best for it, by name."""

    scale: Scale
    measured: Mapping[str, float]


class Law(Protocol):
    """Predicts numbers of a run from its size. A pure function of its fields; changes nothing, owns no memory.

    `predict` gives name -> number, names with their units: "lr", "batch_tokens", "loss" (nats a token) are what
    `waypost plan` compares with the recipe's and with a run's. `doubt` says in a few words why they are a guess at that
    size, and nothing where the constants were found with such. `fit` gives the law whose constants fit `runs` best, each of
    which carries every name that `predict` gives, or raises ConfigError where they do not determine the constants.
    Invariant: numbers are finite and positive; a law fitted to its own predictions predicts them again.
    """

    def predict(self, scale: Scale) -> dict[str, float]: ...

    def doubt(self, scale: Scale) -> str: ...

    def fit(self, runs: Sequence[Run]) -> Self: ...


LAWS: Mapping[str, type[Law]] = {"step_law": StepLaw}
