"""One choice's answer as it grows: what the sampler must know of it, what may be shown, and when it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from waypost.serve.request import Delta, Detokenizer, FinishReason
from waypost.serve.sampling import Ask, Draw, Sampling
from waypost.serve.sampling.grammar import Matcher
from waypost.serve.sampling.stops import StopStrings


class Answer:
    """Takes drawn tokens and gives deltas. `max_tokens` is the resolved limit; `eos_ids` are the model's end tokens."""

    def __init__(
        self, request_id: str, choice: int, prompt: Sequence[int], sampling: Sampling, *, seed: int, max_tokens: int,
        eos_ids: Sequence[int], detokenizer: Detokenizer | None, matcher: Matcher | None = None,
    ) -> None:  # fmt: skip
        self.request_id, self.choice, self.sampling, self.max_tokens = request_id, choice, sampling, max_tokens
        self.num_tokens = 0
        self._seed = seed
        self._ends = frozenset([*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids)])
        self._never_yet = sorted({*sampling.stop_token_ids, *eos_ids}) if sampling.min_tokens else []
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stops = StopStrings(sampling.stop)
        self._counts: Counter[int] = Counter()
        self._prompt_ids: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._prompt_ids = torch.tensor(sorted(set(prompt)), dtype=torch.int64)

    @property
    def plain(self) -> bool:
        """Whether the next draws take the token of the largest logit, as it comes from the model, and ask for no more."""
        s = self.sampling
        return s.takes_largest and not s.edits_logits and self._matcher is None and self.num_tokens >= s.min_tokens

    def ask(self, position: int) -> Ask:
        """What the row of logits for absolute `position` is to become."""
        forbidden = self._never_yet if self.num_tokens < self.sampling.min_tokens else ()
        allowed = self._matcher.allowed() if self._matcher is not None else None
        return Ask(self.sampling, self._seed, self.choice, position, self._counts, self._prompt_ids, forbidden, allowed)

    def take(self, draw: Draw) -> Delta:
        """Adds a token. A delta with a finish_reason is the last."""
        if draw.failure is not None:
            return self.end("error", error=draw.failure)
        self.num_tokens += 1
        if self.sampling.edits_logits:
            self._counts[draw.token_id] += 1
        armed = self.num_tokens >= self.sampling.min_tokens
        if armed and draw.token_id in self._ends:
            return self.end("stop", stopped_by=draw.token_id, tokens=(draw,))
        text = self._detokenizer.push(draw.token_id) if self._detokenizer is not None else ""
        if armed:
            text, stop = self._stops.push(text)
            if stop is not None:
                return Delta(self.request_id, self.choice, text, (draw,), "stop", stop)
        if self._matcher is not None:
            failure = self._matcher.take(draw.token_id)
            if failure is not None:
                return self.end("error", text=text, tokens=(draw,), error=failure)
            if self._matcher.complete:
                return self.end("stop", text=text, tokens=(draw,))
        if self.num_tokens == self.max_tokens:
            return self.end("length", text=text, tokens=(draw,))
        return Delta(self.request_id, self.choice, text, (draw,))

    def end(
        self, reason: FinishReason, *, text: str = "", tokens: tuple[Draw, ...] = (), stopped_by: str | int | None = None,
        error: str | None = None,
    ) -> Delta:  # fmt: skip
        """The last delta: `text` and whatever was held back. Bytes that never became a character are shown as U+FFFD."""
        rest, stop = self._stops.push(self._detokenizer.flush()) if self._detokenizer is not None else ("", None)
        if stop is not None:  # the held-back bytes completed a stop string
            return Delta(self.request_id, self.choice, text + rest, tokens, "stop", stop)
        return Delta(self.request_id, self.choice, text + rest + self._stops.flush(), tokens, reason, stopped_by, error)
