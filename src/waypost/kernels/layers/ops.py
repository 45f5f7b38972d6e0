"""The operators that run many layers in one call: what each computes.

Shapes: T tokens, S sequences, C hidden_size, V vocab_size, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.kernels.layers.weights import LayerAdapters, LayerTable, ModelEnds
    from waypost.kernels.ops import Pages


class RunLayersOp(Protocol):
    """h (T, C) through the layers of `table` that `order` names, at once -> (T, C). Not differentiable.

    cos and sin (T, D/2) float32 are the rows' angles; starts (S + 1,) and context (S,) are those of the batch. Writes the
    rows' keys and values to `pages`. `which` (T,) int32 says which of `adapters` changes each row, -1: none. The bits are
    those of the other operators, one by one.
    """

    def __call__(
        self, table: LayerTable, order: Sequence[int], h: Tensor, pages: Pages, starts: Tensor, context: Tensor,
        cos: Tensor, sin: Tensor, which: Tensor | None = None, adapters: LayerAdapters | None = None,
    ) -> Tensor: ...  # fmt: skip


class RunModelOp(Protocol):
    """tokens (T,) through the embedding, all layers of `table`, the last norm and the head of `ends` -> logits (n, V) of
    the rows `wanted` (n,) int64; None: of every row. The rest as for RunLayersOp.
    """

    def __call__(
        self, table: LayerTable, ends: ModelEnds, tokens: Tensor, wanted: Tensor | None, pages: Pages, starts: Tensor,
        context: Tensor, cos: Tensor, sin: Tensor, which: Tensor | None = None, adapters: LayerAdapters | None = None,
    ) -> Tensor: ...  # fmt: skip


class RunGreedyOp(Protocol):
    """As RunModelOp, for `ends` with a screen -> LargestOp of the logits of `wanted`."""

    def __call__(
        self, table: LayerTable, ends: ModelEnds, tokens: Tensor, wanted: Tensor | None, pages: Pages, starts: Tensor,
        context: Tensor, cos: Tensor, sin: Tensor, which: Tensor | None = None, adapters: LayerAdapters | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A sequence that passes carry on."""

    tokens: Sequence[int]
    """Its last ones, the newest among them, whose key is not cached yet."""
    room: int
    """Tokens that it may be given."""
    guesses: int = 0
    """Most of what follows that a pass may guess."""


@dataclass(frozen=True)
class Guessing:
    """When passes guess: what followed the last tokens of a text where they stood before is guessed to follow again."""

    longest: int = 3
    """Last tokens that are looked for; then fewer, down to `shortest`."""
    shortest: int = 2
    plain: int = 0
    """Passes before the first with guesses."""
    credit: float = 0.0
    """What guesses may lose before there are no more, counted in passes without any."""
    gain: float = 1.0
    """In the same: a guess's coming true, where it does for every sequence."""
    plain_s: float = 0.0
    """Seconds of such a pass; 0: not known, so that the first of them says it."""


@dataclass(frozen=True)
class Passed:
    """What n passes of S sequences have come to."""

    counts: Sequence[int]
    """(S,): tokens that each was given, at least one a pass."""
    tokens: Tensor
    """(S, most of them) int64; of each sequence the first `counts` hold."""
    peaks: Tensor
    """(S, most of them) float32: their logits."""
    guessed: Tensor
    """(S, n) int32: guesses of each sequence in each pass."""
    accepted: Tensor
    """(S, n) int32: those of them that came true."""
    seconds: Tensor
    """(n,) float64: what each pass took."""


class RunPassesOp(Protocol):
    """RunGreedyOp again and again, over the newest token of each of S `texts`, and over its guesses -> their next tokens.

    There are `passes`, or fewer where a text has no more room. `context` (S,) int32 are cached keys before the first pass,
    `pages.table` has the pages of all that may come, and cos and sin (S, R, D/2) are the angles of each sequence's next R
    positions. The bits are those of a pass for each token.
    """

    def __call__(
        self, table: LayerTable, ends: ModelEnds, texts: Sequence[Text], pages: Pages, context: Tensor, cos: Tensor,
        sin: Tensor, passes: int, guessing: Guessing,
    ) -> Passed: ...  # fmt: skip


@dataclass(frozen=True)
class AtOnceOps:
    """The set of them."""

    run_layers: RunLayersOp
    run_model: RunModelOp
    run_greedy: RunGreedyOp
    run_passes: RunPassesOp
