"""Tiny models of every kind that serving must get right, and a reference that knows no cache, no pages and no batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from waypost.core.batch import Batch
from waypost.kernels.build import available
from waypost.model.decoder import Decoder
from waypost.model.head import token_log_probs
from waypost.serve.answer import Answer
from waypost.serve.drafting import Wish
from waypost.serve.engine import Engine
from waypost.serve.request import Completion
from waypost.serve.sampling import Sampling, sample
from waypost.serve.scheduling import Policy
from waypost.testing.tiny import tiny_config, tiny_model

VARIANTS: dict[str, dict[str, object]] = {
    "gqa": {},
    "one-kv-head-wide": {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": False},
    "window": {"model_type": "mistral", "sliding_window": 19},
    "qk-norm": {"model_type": "qwen3", "head_dim": 16},
    "post-norm": {"model_type": "olmo2"},
    "bias": {"model_type": "qwen2"},
    "panels": {"intermediate_size": 144, "head_dim": 16, "attention_bias": True, "mlp_bias": True},
    "moe": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
KERNELS = ("naive", "cpu") if available() else ("naive",)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@functools.cache
def model_of(variant: str, dtype: str, kernel: str = "auto") -> Decoder:
    return tiny_model(tiny_config(**VARIANTS[variant]), dtype=DTYPES[dtype], kernel=kernel)  # type: ignore[arg-type]


def poison(engine: Engine, pages: list[int] | None = None) -> None:
    """Fills `pages` (None: all) with NaN: nothing may depend on what a page held before it was written."""
    for tensor in (*engine.kv.k_pages, *engine.kv.v_pages):
        if pages is None:
            tensor.fill_(float("nan"))
        else:
            tensor[pages] = float("nan")


def make_engine(
    model: Decoder, *, num_pages: int = 64, max_batch_tokens: int = 64, policy: Policy | None = None, **more: Any
) -> Engine:
    engine = Engine(model, num_pages=num_pages, max_batch_tokens=max_batch_tokens, policy=policy, **more)
    poison(engine)
    return engine


Answered = tuple[list[int], list[float | None], list[float | None], str | None]


def by_hand(model: Decoder, prompt: list[int], sampling: Sampling, choice: int = 0) -> Answered:
    """(tokens, log-probabilities, those of the draw, finish reason), computed by the trainer's forward over the whole
    sequence for every token, and with log-probabilities of the trainer's own."""
    assert sampling.seed is not None
    assert sampling.max_tokens is not None
    eos = model.config.eos_token_ids
    answer = Answer(
        "by-hand", choice, prompt, sampling, seed=sampling.seed, max_tokens=sampling.max_tokens, eos_ids=eos, detokenizer=None
    )
    tokens, drawn, reason = list(prompt), [], None
    while reason is None:
        with torch.no_grad():
            logits = model(Batch.of([tokens]))[-1:]
        draw = sample(logits, [answer.ask(len(tokens))], model.ops)[0]
        reason = answer.take(draw).finish_reason
        tokens.append(draw.token_id)
        drawn.append(draw.drawn_logprob)
    batch = Batch.of([tokens[:-1]], targets=[tokens[1:]])
    logprobs = token_log_probs(model, batch)[len(prompt) - 1 :].tolist()
    return tokens[len(prompt) :], logprobs, drawn, reason


def answers_of(completion: Completion) -> list[Answered]:
    return [(c.token_ids, c.logprobs, [d.drawn_logprob for d in c.tokens], c.finish_reason) for c in completion.choices]


def finish(engine: Engine, completion: Completion, between: Callable[[int], object] = lambda step: None) -> Completion:
    """Steps until the answer is whole; `between` may do anything before each, and the scheduler is checked after it."""
    for step in range(1000):
        if completion.done:
            return completion
        between(step)
        for delta in engine.step():
            if delta.request_id == completion.request_id:
                completion.add(delta)
        engine.scheduler.check()
    raise AssertionError("it does not come to an end")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [3 + (7 * i * i + 13 * i + 29 * seed) % 280 for i in range(length)]


@dataclass
class Told:
    """A drafter that knows what will be said, but for every `lie`-th token."""

    said: dict[int, list[int]]
    """First token of a text -> the whole text."""
    lie: int = 5
    most: int = 4

    def build(self) -> Told:
        return self

    def observe(self, key: int, tokens: Sequence[int]) -> None: ...

    def propose(self, wishes: Sequence[Wish]) -> list[list[int]]:
        chains = []
        for wish in wishes:
            text, at = self.said.get(wish.tokens[0], []), len(wish.tokens)
            right = text[at : at + min(self.most, wish.most)]
            chains.append([t if (at + i) % self.lie else (t + 1) % 288 for i, t in enumerate(right)])
        return chains

    def forget(self, key: int) -> None: ...
