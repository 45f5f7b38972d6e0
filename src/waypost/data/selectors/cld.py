"""CLD: keep the documents whose loss moves, from checkpoint to checkpoint, as the reference's loss moves.

Source    Nagaraj et al. 2025, Coresets from Trajectories: Selecting Data via Correlation of Loss Differences,
          arXiv:2508.20230, sec. 3 (the authors' Compute_CLD_scores has the guards)
Equation  d_m[t] = l_t(m) - l_(t-1)(m);  v_c[t] = the same of the mean loss of the reference of domain c;
          score(m) = Pearson correlation of d_m and v_c(m) over t
Shapes    losses (T, M) and (T, D) -> scores (M,) in [-1, 1]
Acts on   each document alone, against its domain's reference
Differs   a sample is a document, its loss the mean over its tokens; a class is a source. `skip` leaves out the first
          checkpoints: in a language model the fall that all documents share comes first, and drowns the rest
Exact     losses scaled by a positive number, or shifted, give the same scores; a loss that never moves scores 0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from waypost.core.config import technique
from waypost.core.errors import ConfigError

if TYPE_CHECKING:
    from waypost.data.selectors import Documents

Floats = NDArray[np.float64]


def correlations(x: Floats, y: Floats) -> Floats:
    """Pearson's correlation of each column of x (T, M) with that of y (T, M): (M,); 0 where one of them does not move."""
    x, y = (_up_to_one(z - z.mean(axis=0)) for z in (x, y))  # squares of the smallest numbers would be zero, or hardly right
    scale = np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))
    return np.where(scale > 0, (x * y).sum(axis=0) / np.where(scale > 0, scale, 1.0), 0.0)


def _up_to_one(x: Floats) -> Floats:
    largest = np.abs(x).max(axis=0)
    return x / np.where(largest > 0, largest, 1.0)


@technique
class Cld:
    skip: int = 0
    """Checkpoints left out, counted from the first."""

    def __post_init__(self) -> None:
        if self.skip < 0:
            raise ConfigError(f"Cld.skip={self.skip}: a number of checkpoints, at least 0")

    def score(self, documents: Documents) -> Floats:
        count = documents.num_models - self.skip
        if count < 3:
            raise ConfigError(
                f"cld: {documents.num_models} checkpoint(s) less skip={self.skip} leave {max(0, count)}; a correlation of "
                "differences needs 3, and says little below 10: save more often (save.every_steps, save.keep_last)"
            )
        losses = documents.losses()
        moved, reference = (np.diff(part[self.skip :], axis=0) for part in (losses.documents, losses.reference))
        return correlations(moved, reference[:, documents.domains])
