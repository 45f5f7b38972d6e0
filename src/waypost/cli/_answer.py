"""What the verbs that talk with a model share: its tokenizer, whether its chat template is used, and one answer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from waypost.core.errors import ConfigError, WaypostError, counted

if TYPE_CHECKING:
    from waypost.model.tokenizer import Tokenizer
    from waypost.serve.engine import Engine
    from waypost.serve.request import Choice
    from waypost.serve.sampling import Sampling


def tokenizer_of(engine: Engine, where: str) -> Tokenizer:
    """The engine's tokenizer; ConfigError where there is none."""
    from waypost.model.tokenizer import Tokenizer

    if not isinstance(engine.tokenizer, Tokenizer):
        raise ConfigError(f"{where}: has no tokenizer.json; copy it from the model that the weights come from")
    return engine.tokenizer


def decide(tokenizer: Tokenizer, chat: bool | None, system: str | None, talking: bool) -> bool:
    """Whether the chat template is used; ConfigError where something needs it and it cannot be."""
    wanted = tokenizer.has_chat_template if chat is None else chat
    if not wanted and (system is not None or talking):
        what = "--system" if system is not None else "a conversation"
        why = "--no-chat turns it off" if chat is False else "this checkpoint has none"
        raise ConfigError(f"{what} needs a chat template, and {why}; give a PROMPT alone, or a checkpoint that has one")
    return wanted


@dataclass(frozen=True)
class Answer:
    """One finished, or interrupted, answer and how long it took."""

    choice: Choice
    prompt_tokens: int
    seed: int
    first_token_s: float
    total_s: float
    interrupted: bool

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first, whose time is the prompt's."""
        later, span = len(self.choice.tokens) - 1, self.total_s - self.first_token_s
        return later / span if later > 0 and span > 0 else 0.0

    @property
    def summary(self) -> str:
        """The line for stderr: prompt, time to the first token, speed, why it ended, and the seed that repeats it."""
        speed = f", then {self.tokens_per_s:.1f} tokens/s" if self.tokens_per_s else ""
        how = {"stop": "it ended by itself", "length": "it was cut at --max-tokens or the context"}
        why = "interrupted" if self.interrupted else how.get(str(self.choice.finish_reason), "")
        return (
            f"[{counted(self.prompt_tokens, 'prompt token')}, first token after {self.first_token_s:.2f} s{speed}; "
            f"{counted(len(self.choice.tokens), 'token')}, {why}; seed {self.seed}]"
        )

    @property
    def tree(self) -> dict[str, Any]:
        return {
            "text": self.choice.text,
            "token_ids": self.choice.token_ids,
            "finish_reason": "interrupted" if self.interrupted else self.choice.finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.choice.tokens),
            "seed": self.seed,
            "first_token_s": self.first_token_s,
            "total_s": self.total_s,
            "tokens_per_s": self.tokens_per_s,
        }


def run(
    engine: Engine, ids: Sequence[int], sampling: Sampling, show: Callable[[str], None] | None, adapter: str | None = None
) -> Answer:
    """Answers the prompt `ids`, giving text to `show` as it becomes certain. Ctrl-C ends the answer, not the program."""
    from waypost.serve.request import Request

    began = time.monotonic()
    ready = engine.prepare(Request(ids, sampling, adapter=adapter))
    completion = ready.completion()
    first_token_s, interrupted = 0.0, False
    engine.submit(ready)
    while not completion.done:
        try:
            for delta in engine.step():
                if delta.error is not None:
                    raise WaypostError(f"the answer failed: {delta.error}")
                first_token_s = first_token_s or time.monotonic() - began
                completion.add(delta)
                if show is not None and delta.text:
                    show(delta.text)
        except KeyboardInterrupt:
            interrupted = True
            engine.cancel(ready.id)
    return Answer(completion.choices[0], len(ids), ready.seed, first_token_s, time.monotonic() - began, interrupted)
