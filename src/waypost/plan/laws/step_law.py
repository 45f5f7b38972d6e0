"""step_law: the peak learning rate and the batch size that give the lowest loss, from parameters and tokens.

Source    Li et al. 2025, Predictable Scale: Part I, Step Law, arXiv:2503.04715, the law as its
          tool gives it: 1.79, -0.713, 0.307; 0.58, 0.571
Equation  lr = c_lr N^a_lr D^b_lr,   batch = c_batch D^b_batch  in tokens;  N parameters without embeddings, D tokens
Shapes    (N, D) -> two numbers
Acts on   a whole run
Differs   nothing in the law. It was found with AdamW, weight decay 0.1, cosine to a fixed 1e-5, N of 60 M to 1 B and D of 2 B
          to 100 B tokens; far from there (a tiny model, Muon, wsd) it is a first guess: with 0.3 M and wsd twice the best rate
Exact     fitted to its own predictions it gives its constants back
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from waypost.core.config import technique
from waypost.core.errors import ConfigError

if TYPE_CHECKING:
    from waypost.plan.laws import Run, Scale


SMALLEST = 60_000_000
"""Parameters, without embedding and head, of the smallest models that the law was found with."""


def power_fit(rows: Sequence[Sequence[float]], values: Sequence[float], what: str) -> list[float]:
    """log(values) = k_0 + sum_i k_i log(rows[i]) by least squares: [k_0, k_1 ...]. ConfigError where `rows` cannot tell."""
    import numpy as np

    if not rows or min(min(row) for row in rows) <= 0 or min(values) <= 0:
        raise ConfigError(f"{what}: a power law is fitted to at least one run, and to positive numbers")
    a = np.column_stack([np.ones(len(rows)), np.log(np.array(rows, dtype=np.float64))])
    found, _, rank, _ = np.linalg.lstsq(a, np.log(np.array(values, dtype=np.float64)), rcond=1e-9)
    if rank < a.shape[1]:
        raise ConfigError(f"{what}: {len(rows)} runs do not tell {a.shape[1]} constants; vary parameters and tokens apart")
    return [float(k) for k in found]


@technique
class StepLaw:
    lr_factor: float = 1.79
    lr_parameters: float = -0.713
    lr_tokens: float = 0.307
    batch_factor: float = 0.58
    batch_tokens: float = 0.571

    def __post_init__(self) -> None:
        if not (self.lr_factor > 0 and self.batch_factor > 0):
            raise ConfigError(f"StepLaw: lr_factor={self.lr_factor} and batch_factor={self.batch_factor} must be positive")

    def predict(self, scale: Scale) -> dict[str, float]:
        return {
            "lr": self.lr_factor * scale.parameters**self.lr_parameters * scale.tokens**self.lr_tokens,
            "batch_tokens": self.batch_factor * scale.tokens**self.batch_tokens,
        }

    def doubt(self, scale: Scale) -> str:
        return "" if scale.parameters >= SMALLEST else f"a guess: found with {SMALLEST / 1e6:.0f}M parameters and more"

    def fit(self, runs: Sequence[Run]) -> Self:
        sizes = [(run.scale.parameters, run.scale.tokens) for run in runs]
        lr = power_fit(sizes, [run.measured["lr"] for run in runs], "step_law, lr")
        batch = power_fit([s[1:] for s in sizes], [run.measured["batch_tokens"] for run in runs], "step_law, batch_tokens")
        return dataclasses.replace(
            self, lr_factor=math.exp(lr[0]), lr_parameters=lr[1], lr_tokens=lr[2], batch_factor=math.exp(batch[0]),
            batch_tokens=batch[1],
        )  # fmt: skip
