"""What a part of a layer keeps of a token for its backward pass, counted in numbers: what plans of memory are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Numbers a token that plain autograd holds between a part's forward pass and its backward pass.

    Counted are tensors that grow with the tokens, each once, the part's own input and output left out: the layer counts
    those. With the compiled kernels; the specification's hold more.
    """

    narrow: float = 0.0
    """In the compute dtype, `pairs` and `cheap` among them."""
    wide: float = 0.0
    """In float32."""
    pairs: float = 0.0
    """Of `narrow`, keys and values that later rows of a sequence look at."""
    cheap: float = 0.0
    """Of `narrow`, outputs of operators that have a `recompute`."""
    passing: float = 0.0
    """In the compute dtype, gradients that are there beside all that while the part is differentiated, at the most."""

    def __add__(self, other: Kept) -> Kept:
        return Kept(
            self.narrow + other.narrow, self.wide + other.wide, self.pairs + other.pairs, self.cheap + other.cheap,
            self.passing + other.passing,
        )  # fmt: skip
