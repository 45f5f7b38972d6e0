"""What a request asks of the sampler: every field of the public interface, checked when it is built."""

from __future__ import annotations

import functools
import math
from dataclasses import field

from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.serve.sampling.grammar import Grammar

MAX_LOGPROBS = 128
"""Most alternatives that a request may ask for at each position."""


@technique
class Sampling:
    """Immutable. The order of application is Hugging Face's: bias, penalties, minimum length, temperature, top-k, top-p,
    min-p. A draw depends on (seed, choice, position) and on the row of logits alone."""

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token (the lowest id among equals)."""
    top_k: int | None = None
    """Keep the k most likely tokens (and those equal to the last of them); None keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens whose probabilities first reach this sum; in (0, 1]."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one; in [0, 1]."""
    repetition_penalty: float = 1.0
    """Hugging Face's: positive logits of tokens in the prompt or the answer are divided by it, negative multiplied."""
    presence_penalty: float = 0.0
    """OpenAI's: subtracted once from the logit of every token of the answer so far; in [-2, 2]."""
    frequency_penalty: float = 0.0
    """OpenAI's: subtracted from a token's logit once for every time it stands in the answer so far; in [-2, 2]."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit, before everything else."""
    seed: int | None = None
    """None: the engine picks one, and the completion names it."""
    max_tokens: int | None = None
    """Tokens to generate at most; None: as many as the context holds; 0: none, the prompt is only scored."""
    min_tokens: int = 0
    """Tokens to generate at least: until then no end token can be drawn and no stop string is looked for."""
    stop: list[str] = field(default_factory=list)
    """The answer ends before the first of these strings; it is not part of the text."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the answer, beside the model's own; kept in the token ids, not in the text."""
    ignore_eos: bool = False
    """Go on past the model's own end tokens."""
    n: int = 1
    """Independent choices for the same prompt."""
    logprobs: int | None = None
    """None: no log-probabilities; k: that of each token, and the k most likely alternatives."""
    prompt_logprobs: int | None = None
    """None: the prompt is not scored; k: the log-probability of each of its tokens, and the k most likely alternatives."""
    grammar: Grammar | None = None
    """What the answer must match (sampling/grammar.py); it ends where nothing more can follow."""

    def __post_init__(self) -> None:
        rules = (
            (
                "temperature",
                self.temperature == 0 or 1e-6 <= self.temperature < math.inf,
                "must be 0 (greedy) or at least 1e-6",
            ),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1; leave it out to keep every token"),
            ("top_p", 0.0 < self.top_p <= 1.0, "must be in (0, 1]; 1 keeps every token"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "must be in [0, 1]; 0 keeps every token"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "must be in [0.01, 100]; 1 changes nothing"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "must be in [-2, 2]"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "must be in [-2, 2]"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "must be a 64-bit integer, from -2**63 to 2**63 - 1"),
            ("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "must be finite numbers by token id"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1 or self._only_scores, "must be at least 1"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (math.inf if self.max_tokens is None else self.max_tokens),
                "must be in 0..max_tokens",
            ),
            ("stop", all(self.stop), "must hold no empty string; leave it out to stop nowhere"),
            ("n", self.n >= 1, "must be at least 1"),
            ("min_tokens", not (self.grammar and self.min_tokens), "must be 0 beside a grammar, which says where it ends"),
            ("ignore_eos", not (self.grammar and self.ignore_eos), "must be false beside a grammar, which says where it ends"),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MAX_LOGPROBS, f"must be in 0..{MAX_LOGPROBS}"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"must be in 0..{MAX_LOGPROBS}"),
        )
        for name, holds, allowed in rules:
            if not holds:
                raise ConfigError(f"Sampling.{name}={getattr(self, name)!r}: {allowed}")

    @property
    def _only_scores(self) -> bool:
        return self.max_tokens == 0 and self.prompt_logprobs is not None

    @functools.cached_property
    def edits_logits(self) -> bool:
        """Whether anything changes the logits before temperature (other than `min_tokens`, which ends)."""
        neutral = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != neutral or bool(self.logit_bias)

    @functools.cached_property
    def takes_largest(self) -> bool:
        """Whether a draw is the token of the largest logit, as it comes from the model or edited, and its probability is not
        asked for."""
        return self.temperature == 0 and self.logprobs is None
