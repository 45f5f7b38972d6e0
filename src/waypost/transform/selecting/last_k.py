"""Last k: the newest checkpoints of a run, evenly spaced, to be averaged.

Source    Schmidt et al. 2023, Free Lunch: Robust Cross-Lingual Transfer via Model Checkpoint Averaging, arXiv:2305.16834
Equation  steps s_n, s_{n-e}, ..., s_{n-(k-1)e}   of a run's steps s_1 < ... < s_n      k = how many, e = every
Shapes    a run folder -> k checkpoint folders, newest first
Acts on   one run; the mean itself is `method: soup` (or any other method)
Differs   the paper averages every snapshot of a run; here k and the spacing are chosen, so that warm-up stays out
Exact     k = 1 is the newest checkpoint itself
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from waypost.core.config import technique
from waypost.core.errors import ConfigError


def last_steps(steps: Sequence[int], k: int, every: int) -> list[int]:
    """The newest of the rising `steps`, then each `every`-th before it, `k` in all, newest first; too few is a ConfigError."""
    chosen = list(reversed(steps))[: 1 + (k - 1) * every : every]
    if len(chosen) < k:
        raise ConfigError(
            f"last_k: needs {1 + (k - 1) * every} checkpoints for k={k}, every={every}; the run keeps {len(steps)}, at steps "
            f"{list(steps)}; lower k, or keep more while training"
        )
    return chosen


@technique
class LastK:
    k: int = 5
    """How many checkpoints."""
    every: int = 1
    """Take each `every`-th checkpoint, counted back from the newest."""

    def __post_init__(self) -> None:
        if self.k < 1 or self.every < 1:
            raise ConfigError(f"LastK: k={self.k}, every={self.every}; both must be at least 1")

    def select(self, folders: Sequence[Path]) -> list[Path]:
        from waypost.keep.reader import resolve
        from waypost.keep.store import Store

        if len(folders) != 1:
            raise ConfigError(f"last_k: takes one run folder as `sources`, given {len(folders)}")
        found, store = resolve(folders[0]), Store(folders[0])
        if found == folders[0]:
            raise ConfigError(f"last_k: {found} is one checkpoint; give the run folder that holds it, or leave `select` out")
        return [store.checkpoint(step).path for step in last_steps(store.steps(), self.k, self.every)]
