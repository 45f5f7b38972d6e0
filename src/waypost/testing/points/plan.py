"""Planning: laws from the size of a run to numbers about it."""

from __future__ import annotations

import math
from typing import Any

from waypost.plan.laws import LAWS, Run, Scale
from waypost.testing.contracts import Size
from waypost.testing.points._shared import Stateless

SCALES: dict[Size, tuple[Scale, ...]] = {
    "some": tuple(Scale(n, d) for n in (1e6, 3e7, 1e9) for d in (2e7, 5e9)),
    "one": (Scale(1e8, 2e9),),
}


class Laws(Stateless):
    """Numbers are finite and positive; fitted to its own predictions a law predicts them again."""

    table = LAWS
    sizes: tuple[Size, ...] = ("some", "one")

    def inputs(self, size: Size) -> Any:
        return {"scales": SCALES[size]}

    def run(self, technique: Any, inputs: Any) -> Any:
        return [technique.predict(scale) for scale in inputs["scales"]]

    def check(self, technique: Any, inputs: Any, result: Any) -> None:
        assert all(math.isfinite(value) and value > 0 for found in result for value in found.values()), result
        assert all(isinstance(technique.doubt(scale), str) for scale in inputs["scales"]), "doubt is said in words, or is empty"
        made = [Run(scale, technique.predict(scale)) for scale in SCALES["some"]]
        again = technique.fit(made)
        for run in made:
            for name, value in again.predict(run.scale).items():
                assert math.isclose(value, run.measured[name], rel_tol=1e-6), f"{name}: {value}, not {run.measured[name]}"
