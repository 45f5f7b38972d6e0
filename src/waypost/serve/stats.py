"""What the engine counts: plain data, read by the server's metrics and by benchmarks."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds, inclusive; a last bucket without a bound follows."""
TOKEN_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
REASONS = ("stop", "length", "cancelled", "deadline", "error")


@dataclass
class Histogram:
    """Counts by upper bound, not cumulative: counts[i] observations in (bounds[i - 1], bounds[i]]."""

    bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    """Sum of what was observed."""

    def __post_init__(self) -> None:
        self.counts = self.counts or [0] * (len(self.bounds) + 1)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Counts one value in the first bucket whose bound is not below it."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass
class Stats:
    """Counters since the engine was made, and gauges of the present. Times in seconds."""

    num_running: int = 0
    num_waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_held: int = 0
    pages_cached: int = 0
    """Pages nobody refers to, kept by the prefix cache; they are given away when they are needed."""
    prefix_queries: int = 0
    """Tokens of admitted sequences, counted again after a preemption."""
    prefix_hits: int = 0
    """Those of them whose pages the prefix cache had."""
    num_steps: int = 0
    newest_step_s: float = 0.0
    """0 before the first."""
    num_preemptions: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts computed, those computed again after a preemption included."""
    generated_tokens: int = 0
    num_drafts: int = 0
    """Decodes that had guesses after their newest token."""
    draft_tokens: int = 0
    """Tokens guessed, and of them those that were drawn too."""
    accepted_tokens: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    """Choices by finish reason."""
    step_s: Histogram = field(default_factory=Histogram)
    time_to_first_token_s: Histogram = field(default_factory=Histogram)
    inter_token_s: Histogram = field(default_factory=Histogram)
    """Between the tokens of a choice, each at the end of its pass, however they are handed out; tokens of one pass: 0."""
    queue_s: Histogram = field(default_factory=Histogram)
    """From a choice's submission to its first span."""
    prefill_s: Histogram = field(default_factory=Histogram)
    """From a choice's first span to its first token."""
    step_tokens: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    """Tokens computed in a step, guesses among them; those that went through a part of the layers count for that part."""

    def steps(self, tokens: Sequence[float], took_s: float) -> None:
        """Counts a step for each entry of `tokens`, which it computed; they took `took_s` together."""
        self.num_steps += len(tokens)
        self.newest_step_s = took_s / len(tokens)
        for count in tokens:
            self.step_s.observe(self.newest_step_s)
            self.step_tokens.observe(count)

    @property
    def prefix_hit_rate(self) -> float:
        """prefix_hits / prefix_queries, 0 before the first."""
        return self.prefix_hits / self.prefix_queries if self.prefix_queries else 0.0
