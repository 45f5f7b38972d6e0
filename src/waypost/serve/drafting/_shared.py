"""The contract of a drafter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Wish:
    """A sequence that could do with guesses."""

    key: int
    tokens: Sequence[int]
    """All that is known of it, prompt and answer; not to be changed or kept."""
    most: int
    """Guesses that its next step has room for; at least one."""


class Proposer(Protocol):
    """A drafter at work in one engine, which calls it from one thread.

    It owns what it remembers of each sequence, and remembers nothing of one for another: a guess must not show one user's
    text in the timing of another's. `observe` comes before `propose`, for a new sequence with its whole prompt. While guessing
    does not pay neither is called; the next `observe` then brings all tokens since.
    """

    def observe(self, key: int, tokens: Sequence[int]) -> None:
        """The text of sequence `key` has grown to `tokens`, which begin with what they were before."""
        ...

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        """For each wish a chain of at most `most` tokens that may follow `tokens`; an empty one where there is no guess."""
        ...

    def forget(self, key: int) -> None:
        """Sequence `key` has ended."""
        ...


class Drafter(Protocol):
    """Guesses tokens that the model then verifies several at a time.

    Invariants: whatever is proposed, every token and log-probability is what it would be without (the target's draw at a
    position is fixed by the noise; a guess is accepted where it equals the draw, else it is forgotten): fields are costs.
    Equal calls give equal guesses. It sees token ids alone, and neither logits nor the cache.
    """

    def build(self) -> Proposer: ...
