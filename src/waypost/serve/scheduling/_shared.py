"""The contract of a scheduling policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from waypost.serve.ledger import Ledger, LiveSequence


@dataclass(slots=True)  # not frozen, which would make it three times as slow: there is one a token
class Span:
    """The next `num_tokens` uncomputed tokens of `sequence`, through the layers first_layer .. stop_layer - 1."""

    sequence: LiveSequence
    num_tokens: int
    first_layer: int
    stop_layer: int
    draft: tuple[int, ...] = ()
    """Guesses that follow, a row each (serve/speculation.py); a policy leaves them out."""

    @property
    def num_rows(self) -> int:
        """Rows that it has in a batch."""
        return self.num_tokens + len(self.draft)

    @property
    def num_layers(self) -> int:
        """Layers that it goes through."""
        return self.stop_layer - self.first_layer

    @property
    def work(self) -> int:
        """Rows times layers: what it takes of a step."""
        return (self.num_tokens + len(self.draft)) * (self.stop_layer - self.first_layer)


class Policy(Protocol):
    """Chooses the spans of one step, in falling order of precedence; at most one for each sequence.

    `budget_tokens` bounds a step by what it computes: as much as so many tokens through all layers. A span through a part of
    the layers takes that part of its tokens, so a prompt may go through the layers in pieces as well as token by token.

    Mutates nothing. Holds no memory beyond its own fields: everything it may look at is in the ledger. Pages are not its
    business: running sequences get them in the order of the spans, the last by rank lose theirs if there are none, and
    waiting sequences are admitted while pages last.
    Invariants: the work of the spans sums to at most budget_tokens * ledger.num_layers; a span begins at its sequence's
    `layer`, and one under way (layer > 0) keeps its number of tokens; something is chosen while anything runs or waits; a
    sequence that is never preempted is chosen again and again until it ends. The choice moves work in time; it never changes
    a token.
    """

    def schedule(self, ledger: Ledger, budget_tokens: int) -> list[Span]: ...
