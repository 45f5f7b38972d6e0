"""Observes one request's deltas for the metrics, the log and the queue's length, when they arrive."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from waypost.serve.api.access import Caller
from waypost.serve.api.admission import Ticket
from waypost.serve.api.jobs import Work
from waypost.serve.api.metrics import Metrics
from waypost.serve.api.record import Record
from waypost.serve.request import Delta


@dataclass(frozen=True)
class Call:
    """Who asks, and under which terms."""

    caller: Caller
    record: Record
    ticket: Ticket
    user: str = ""
    """Whose turn it takes where the caller has no name."""
    priority: int = 0
    deadline_s: float | None = None
    """Seconds from its arrival; None: the server's."""


@dataclass
class _Seen:
    """What is known of one choice, in seconds of the monotonic clock."""

    began_s: float | None = None
    first_s: float | None = None
    last_s: float = 0.0
    num_tokens: int = 0


@dataclass
class Watch:
    """One request's."""

    metrics: Metrics
    work: Work
    call: Call
    heeded: bool = True
    """Whether somebody reads each token as it comes: its time is then that of its arrival, else that of its pass."""
    _choices: list[_Seen] = field(default_factory=list)
    _num_open: int = 0

    def __post_init__(self) -> None:
        self._choices = [_Seen() for _ in range(self.work.num_choices)]
        self._num_open = self.work.num_choices
        self.call.record.prompt_tokens = sum(len(prompt.token_ids) for prompt in self.work.prompts)

    def see(self, index: int, delta: Delta) -> None:
        """Counts what a step brought for choice `index`: tokens, time to the first, time between them."""
        now = time.monotonic() if self.heeded or delta.at_s is None else delta.at_s
        choice, record = self._choices[index], self.call.record
        record.completion_tokens += len(delta.tokens)
        if delta.tokens:
            self.metrics.generation_tokens.inc(len(delta.tokens))
            choice.num_tokens += len(delta.tokens)
            if choice.first_s is None:
                self._first(index, choice, delta, now)
            else:
                self.metrics.next_token_s.observe(now - choice.last_s)
            choice.last_s = now
        if delta.finish_reason is not None:
            self.metrics.finished[delta.finish_reason].inc()
            record.finished.append(delta.finish_reason)
            self._last(choice, now)

    def _first(self, index: int, choice: _Seen, delta: Delta, now: float) -> None:
        record, waited_s, queued_s = self.call.record, now - self.call.record.began_s, delta.queue_s or 0.0
        choice.first_s, choice.began_s = now, record.began_s + queued_s
        self.metrics.first_token_s.observe(waited_s)
        if index % self.work.n == 0:  # its other choices have the same prompt
            self.metrics.prompt_tokens_cached.inc(delta.cached_tokens or 0)
        self.call.ticket.began(delta.queue_s)
        record.first_token_s = record.first_token_s or waited_s
        record.queue_s = max(record.queue_s or 0.0, queued_s)

    def _last(self, choice: _Seen, now: float) -> None:
        metrics = self.metrics
        metrics.request_s.observe(now - self.call.record.began_s)
        if choice.first_s is not None and choice.began_s is not None:
            metrics.inference_s.observe(now - choice.began_s)
            metrics.decode_s.observe(choice.last_s - choice.first_s)
            if choice.num_tokens > 1:
                metrics.token_s.observe((choice.last_s - choice.first_s) / (choice.num_tokens - 1))
        self._num_open -= 1
        if not self.work.draws:  # noughts would hide how long answers are
            return
        metrics.request_generation_tokens.observe(choice.num_tokens)
        if not self._num_open:
            metrics.longest_choice.observe(max(c.num_tokens for c in self._choices))
