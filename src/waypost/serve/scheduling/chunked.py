"""Chunked prefill: every step runs all decodes, and fills what is left of the budget with pieces of prompts.

Source    Agrawal et al. 2023, SARATHI, arXiv:2308.16369, sec. 4; Agrawal et al. 2024, Sarathi-Serve, arXiv:2403.02310, alg. 3
Equation  budget = decodes + chunk; chunk = min(budget - decodes, prompt tokens left), first come first served
Shapes    ledger, budget in tokens -> spans through all layers
Acts on   the order of work alone
Differs   several prompts may share what is left of a step; the paper gives it to one
Exact     max_chunk_tokens of at least the longest prompt, and a budget to match, is prefill in one piece
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from waypost.core.config import cost, technique
from waypost.core.errors import ConfigError
from waypost.serve.scheduling._shared import Span

if TYPE_CHECKING:
    from waypost.serve.ledger import Ledger, LiveSequence


@technique
class Chunked:
    max_chunk_tokens: int | None = cost(None)
    """Most prompt tokens of one sequence in one step; None leaves it to the budget."""

    def __post_init__(self) -> None:
        if self.max_chunk_tokens is not None and self.max_chunk_tokens < 1:
            raise ConfigError(f"Chunked.max_chunk_tokens={self.max_chunk_tokens}: must be at least 1, or left out")

    def schedule(self, ledger: Ledger, budget_tokens: int) -> list[Span]:
        decodes: list[LiveSequence] = []
        prompts: list[LiveSequence] = []
        for sequence in ledger.running:
            (decodes if sequence.decoding else prompts).append(sequence)
        spans: list[Span] = []
        for sequence in (*decodes, *prompts, *ledger.waiting):
            if budget_tokens < 1:
                break
            span = ledger.span(sequence, min(budget_tokens, self.max_chunk_tokens or budget_tokens))
            spans.append(span)
            budget_tokens -= span.num_tokens
        return spans
