"""What goes into the engine and what comes out: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from waypost.core.errors import ConfigError
from waypost.serve.pooling import Kind
from waypost.serve.sampling import Draw, Sampling
from waypost.serve.scoring import Scored

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
"""stop: an end token, a stop token or a stop string; length: max_tokens or the context; deadline: its time was up."""


@dataclass(frozen=True)
class Request:
    """A prompt, as text (its special tokens are read, and those that the tokenizer adds are added) or token ids, and
    what to make of it."""

    prompt: str | Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    id: str | None = None
    """Must be unique among the requests in flight; None: the engine names it."""
    user: str = ""
    """Users take turns (serve/fairness.py), each with a share in proportion to its `weight`."""
    weight: float = 1.0
    priority: int = 0
    """Lower goes first: before every user's turn, and last to lose its pages."""
    deadline_s: float | None = None
    """Seconds from submission; what is not finished by then ends with what it has, and its pages are free."""
    adapter: str | None = None
    """Name of a loaded adapter (Engine.adapters) that answers; None: the model itself."""
    pooling: Kind | None = None
    """Not None: no token is drawn, the last delta has an `embedding` (serve/pooling.py)."""

    def __post_init__(self) -> None:
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ConfigError(f"Request.deadline_s={self.deadline_s}: must be more than 0 seconds, or None for no deadline")
        if not 0 < self.weight < float("inf"):
            raise ConfigError(f"Request.weight={self.weight}: must be a positive number")


@dataclass(slots=True)  # not frozen, which would make it three times as slow: there is one a token
class Delta:
    """What one step adds to one choice of a request. The last one of a choice has a `finish_reason`."""

    request_id: str
    choice: int
    text: str = ""
    """Text that is now certain; may lag behind the tokens (half a character, a possible stop string)."""
    tokens: tuple[Draw, ...] = ()
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    """The stop string or the end token, where finish_reason is "stop"."""
    error: str | None = None
    queue_s: float | None = None
    """Seconds from submission to the first span, on the first delta of a choice that ran."""
    cached_tokens: int | None = None
    """Tokens of the prompt that the prefix cache had, on the first delta of a choice that has tokens."""
    embedding: Tensor | None = None
    """(C,) float32 of length one, on the last delta of a request with `pooling`."""
    at_s: float | None = None
    """When its token was there, or could not be drawn, by time.monotonic; it may be told later. None: nothing was drawn."""
    prompt_scores: tuple[Scored, ...] | None = None
    """Of every token of the prompt but the first, on the first delta of choice 0 where Sampling.prompt_logprobs asked."""


@dataclass
class Choice:
    """One finished answer."""

    index: int
    text: str = ""
    tokens: list[Draw] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    error: str | None = None

    @property
    def token_ids(self) -> list[int]:
        return [draw.token_id for draw in self.tokens]

    @property
    def weight_versions(self) -> list[int]:
        """The version of the weights that drew each token; all equal unless weights were swapped meanwhile."""
        return [draw.weight_version for draw in self.tokens]

    @property
    def logprobs(self) -> list[float | None]:
        """Log-probability of each token under the model, natural log, where Sampling.logprobs asked for it."""
        return [draw.logprob for draw in self.tokens]

    def add(self, delta: Delta) -> None:
        """Appends what one step brought; `error` says why a choice ended without its answer."""
        self.text += delta.text
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason
        self.stopped_by, self.error = delta.stopped_by, delta.error


@dataclass
class Completion:
    """All choices of one request. `text`, `token_ids` and `finish_reason` are those of the first."""

    request_id: str
    prompt_token_ids: list[int]
    seed: int
    """The seed that was used: given again, with the same weights, it gives the same answer."""
    choices: list[Choice]
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    prompt_scores: tuple[Scored, ...] = ()
    """Of every token of the prompt but the first, where Sampling.prompt_logprobs asked for them."""

    @property
    def prompt_logprobs(self) -> list[float | None]:
        """Log-probability of each token of the prompt; None for the first, and where they were not asked for."""
        found = [score.logprob for score in self.prompt_scores]
        return [None] * (len(self.prompt_token_ids) - len(found)) + found

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    def add(self, delta: Delta) -> None:
        """Hands a step's result to its choice; what the prompt brought (scores, cached tokens) is kept here."""
        self.choices[delta.choice].add(delta)
        if delta.choice == 0 and delta.cached_tokens is not None:
            self.cached_tokens = delta.cached_tokens
        self.prompt_scores = delta.prompt_scores or self.prompt_scores

    @property
    def done(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)


class Detokenizer(Protocol):
    """Turns one answer's tokens into text as they come, never emitting half a character."""

    def push(self, id: int) -> str: ...

    def flush(self) -> str: ...


class TextTokenizer(Protocol):
    """The part of a tokenizer that the engine uses."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> Sequence[int]: ...

    def encode(self, text: str, *, special: bool = False) -> list[int]: ...

    def stream(self) -> Detokenizer: ...
