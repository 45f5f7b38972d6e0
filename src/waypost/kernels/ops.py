"""The operators that a model runs on: what each computes, and the set of them. `choose.py` picks the set.

Shapes: T tokens, H query heads, G key/value heads, D head width, P tokens a page, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.kernels.layers.ops import AtOnceOps
    from waypost.kernels.low_rank.factors import Factors
    from waypost.kernels.vocabulary import Vocabulary

ROW_TILE = 16
"""Rows of a linear are padded to a multiple of this; the bits of a row then do not depend on the row count (design 6)."""

PAGE_TOKENS = 16
"""Tokens in a page of the key/value cache and in a block of attention. A constant: it fixes the order of every reduction."""

Numerics = Literal["exact", "fast"]
Kernel = Literal["auto", "naive", "cpu", "triton"]


class LinearOp(Protocol):
    """x (T, K), weight (N, K), bias (N,) -> (T, N) in the dtype of x; narrower weights are widened. Differentiable."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...


class RmsNormOp(Protocol):
    """x (..., K), weight (K,) -> x / sqrt(mean(x^2) + eps) * weight, in float32, rounded once. Differentiable."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...


class RopeOp(Protocol):
    """x (T, H, D), cos and sin (T, D/2) float32 -> rotated halves, in float32, rounded once. Differentiable in x."""

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor: ...


class SwigluOp(Protocol):
    """gate, up (T, F) -> silu(gate) * up, in float32, rounded once. Differentiable."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


class WritePagesOp(Protocol):
    """Stores k, v (T, G, D) at (page, lane) = (slots // P, slots % P). k_pages (pages, G, D, P), v_pages (pages, G, P, D)."""

    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None: ...


class PagedAttentionOp(Protocol):
    """Causal attention of q (T, H, D) over cached keys and values; row i of sequence s attends to keys 0 .. context[s] + i.

    Pages may lie apart, as those of a cache that has all layers of a page together; each is contiguous.
    table (S, max_pages) int32 names the pages of each sequence in absolute order; the keys of the rows themselves are
    already stored. `window` keeps only the last `window` keys of each row, itself included. Not differentiable.
    The bits of a row depend on its own q and keys alone, never on how the rows were cut into calls.
    """

    def __call__(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
        scale: float, window: int | None,
    ) -> Tensor: ...  # fmt: skip


class CountingAttentionOp(Protocol):
    """PagedAttentionOp, with its bits, that also counts what each key receives.

    sums (pages, G, P) float32 (float64 for q in float64) lie as the keys do. Adds to that of each cached key the softmax
    weights that it gets from the rows, and begins at zero for the rows' own keys: heads of a group in ascending order, then
    rows in ascending order, so that the sums do not depend on how the rows were cut into calls. Pages hold one sequence each.
    """

    def __call__(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
        scale: float, window: int | None, sums: Tensor,
    ) -> Tensor: ...  # fmt: skip


class RaggedAttentionOp(Protocol):
    """Causal attention inside each of S sequences: q (T, H, D), k and v (T, G, D). Differentiable.

    With context (S,) int32, k and v hold that many earlier keys of each sequence before those of its rows, and are as many
    rows longer than q. Its forward gives the bits of PagedAttentionOp.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None,
        context: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


class LogSumExpOp(Protocol):
    """logits (n, V) -> (n,): log sum_v exp(logits[v]), in float32. A log-probability is logits[v] - this."""

    def __call__(self, logits: Tensor) -> Tensor: ...


class LargestOp(Protocol):
    """logits (n, V) -> (n,) the largest of each row in float32, NaN where there is one; (n,) the first place that has it."""

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]: ...


class DrawOp(Protocol):
    """A token from each of `rows` of logits (n, V): (m,) int64, and its share of what is kept, (m,) float64.

    edited[i] (V,) stands for the row's logits where it is not None. wishes (m, 5) float64: temperature; top_k, 0: all; top_p;
    min_p (kernels/draw/truncation.py); a uniform number in [0, 1), at which the cumulative distribution is inverted. Logits are
    at most finite, and one of a row at least is. The bits of a row depend on it and on its wishes alone.
    """

    def __call__(
        self, logits: Tensor, rows: Sequence[int], edited: Sequence[Tensor | None], wishes: Tensor
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


class CrossEntropyGradientOp(Protocol):
    """(softmax(logits) - one_hot(targets)) * weights[:, None], in the dtype of logits; may overwrite logits (n, V).

    lse (n,) is LogSumExpOp of the logits; targets (n,) int64; weights (n,) float32.
    """

    def __call__(self, logits: Tensor, lse: Tensor, targets: Tensor, weights: Tensor) -> Tensor: ...


class SquaredNormOp(Protocol):
    """Sum of the squares of all elements of x, as a float; accumulated in float32 blocks that are added in float64."""

    def __call__(self, x: Tensor) -> float: ...


class LowRankOp(Protocol):
    """out[t] = y[t] + scale x[t] A^T B^T by factors[which[t]], in float32, rounded once; out[t] = y[t] where which[t] < 0.

    x (T, K), y (T, N), which (T,) int32, factors of any ranks. The bits of a row depend on it and its own factors alone.
    Not differentiable: kernels/low_rank/gradient.py is.
    """

    def __call__(self, x: Tensor, y: Tensor, which: Tensor, factors: Sequence[Factors]) -> Tensor: ...


@dataclass(frozen=True)
class Pages:
    """The cache as one forward pass sees it, where storing is WritePagesOp and attending PagedAttentionOp, nothing else."""

    k_pages: Sequence[Tensor]
    """One a layer, (pages, G, D, P)."""
    v_pages: Sequence[Tensor]
    """One a layer, (pages, G, P, D)."""
    table: Tensor
    """(S, max_pages) int32."""
    slots: Tensor
    """(T,) int64."""


@dataclass(frozen=True)
class Ops:
    """One coherent set of operators. Two runs promise equal bits only on equal sets (`name`)."""

    name: str
    linear: LinearOp
    rms_norm: RmsNormOp
    rope: RopeOp
    swiglu: SwigluOp
    write_pages: WritePagesOp
    paged_attention: PagedAttentionOp
    counting_attention: CountingAttentionOp
    ragged_attention: RaggedAttentionOp
    log_sum_exp: LogSumExpOp
    largest: LargestOp
    draw: DrawOp
    cross_entropy_gradient: CrossEntropyGradientOp
    squared_norm: SquaredNormOp
    vocabulary: Vocabulary
    low_rank: LowRankOp
    at_once: AtOnceOps | None = None
    """None: layers are run an operator at a time."""

    @property
    def compiled(self) -> bool:
        """Whether these are the compiled operators of a CPU, for which weights are packed."""
        return self.at_once is not None
