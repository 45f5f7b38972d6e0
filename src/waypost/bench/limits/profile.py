"""Profiles of a serving step: what its kinds of work took inside it, beside what the machine gives at that moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from waypost.bench import peaks
from waypost.bench.peaks import Peaks
from waypost.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.model.config import ModelConfig
    from waypost.serve.engine import Engine


@dataclass(frozen=True)
class Work:
    """A step: a prompt's first token, or, with streams, the next token of each of them."""

    name: str
    claims: tuple[str, ...]
    prompt_tokens: int
    streams: int = 0

    @property
    def rows(self) -> int:
        return self.streams or self.prompt_tokens

    @property
    def heads(self) -> int:
        """Rows that are projected to the vocabulary."""
        return self.streams or 1

    @property
    def answers(self) -> int:
        """Tokens that the claims count for one step."""
        return self.streams or self.prompt_tokens


WORKS = (
    Work("prefill of 512 tokens", ("serve.prefill.vllm",), 512),
    Work("one stream", ("serve.pass.vllm",), 64, 1),
    Work("16 streams", ("serve.streams16.vllm",), 64, 16),
    Work("32 streams", ("serve.streams32.vllm",), 64, 32),
)
STEPS = 32
"""Tokens that each stream draws in a round."""
QUICKEST = 0.25
"""Share of the steps that is averaged: what else ran on the machine only ever adds."""


@dataclass(frozen=True)
class Part:
    """One kind of work in a step. `flops` and `moved_bytes` are what it must do; both 0 where that says nothing."""

    name: str
    seconds: float
    flops: float = 0.0
    moved_bytes: float = 0.0
    pace: float = 1.0
    """How many of its operations take the time of one in bfloat16."""

    def least_s(self, at: Peaks) -> float:
        """Seconds that the machine needs for it at least."""
        return max(self.flops / (self.pace * at.flops), self.moved_bytes / at.read_bytes)


@dataclass(frozen=True)
class Profile:
    """The parts of a step, in the order in which they run, and the peaks measured next to it."""

    work: Work
    parts: Sequence[Part]
    peaks: Peaks

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def least_s(self) -> float:
        return self.least_at(self.peaks)

    def least_at(self, at: Peaks) -> float:
        """Seconds that its operations and bytes take at other peaks."""
        return sum(part.least_s(at) for part in self.parts)


def measure(engine: Engine, work: Work, rounds: int) -> Profile:
    """Profiles `work` on an engine that has nothing else to do; peaks and steps in turn."""
    import torch

    from waypost.kernels.layers.weights import KINDS
    from waypost.kernels.linear.compact import FEW_ROWS
    from waypost.model.linear.at_once import LayersAtOnce
    from waypost.model.linear.few_rows import AFTER

    once = engine.model.at_once
    if not isinstance(once, LayersAtOnce):
        raise ConfigError("limits are measured where all layers run in one call: a dense model in bfloat16, compiled kernels")
    seconds = torch.zeros(len(KINDS), dtype=torch.float64)
    once.time_into(seconds)
    steps: list[list[float]] = []
    draws, found_peaks = [], []
    try:
        # Some do not count: caches fill, clocks rise, and after a while few rows have their weights coded.
        first = 1 if work.rows > FEW_ROWS else -(-(AFTER + len(engine.model.config.layers)) // STEPS) + 1
        for turn in range(first + rounds):
            found = _steps(engine, work, seconds, turn)
            if turn >= first:
                steps += found
                draws.append(_draw_s(engine, work))
                found_peaks.append(peaks.measure())
    finally:
        once.time_into(None)
    steps.sort()
    quick = steps[: max(3, int(len(steps) * QUICKEST))]
    whole, *kinds = (statistics.fmean(column) for column in zip(*quick, strict=True))
    taken = dict(zip(KINDS, kinds, strict=True))
    parts = _parts(engine.model.config, work, taken, once.weight_bytes(work.rows), whole, min(draws), once.screened)
    return Profile(work, parts, Peaks.best(found_peaks))


def _steps(engine: Engine, work: Work, seconds: Tensor, turn: int) -> list[list[float]]:
    """Seconds of each step, and of the kinds of work in it: of streams, of the steps in which every one of them decodes."""
    from waypost.serve.request import Request
    from waypost.serve.sampling import Sampling

    vocab = engine.model.config.vocab_size
    wish = Sampling(temperature=0.0, max_tokens=STEPS if work.streams else 1, ignore_eos=True)
    for i in range(work.heads):
        engine.submit(Request([(turn * 7919 + i * 31 + k * 17) % vocab for k in range(work.prompt_tokens)], wish))
    found = []
    before = 0  # streams that drew a token in the last step
    while not engine.idle:
        seconds.zero_()
        began = time.perf_counter()
        drew = len(engine.step())
        taken = [time.perf_counter() - began, *seconds.tolist()]
        if not work.streams or drew == before == work.streams:  # some begin later than others, and so end later
            found.append(taken)
        before = drew
    return found


def _draw_s(engine: Engine, work: Work) -> float:
    """Seconds of drawing from what a step's head gives, alone and at best."""
    import torch

    from waypost.measure.machine import best_seconds
    from waypost.serve.sampling import Ask, Likeliest, Sampling, sample

    model, greedy = engine.model, Sampling(temperature=0.0)
    asks = [Ask(greedy, seed=0, choice=i, position=9) for i in range(work.heads)]
    logits = torch.linspace(-1, 1, work.heads * model.config.vocab_size).view(work.heads, -1).to(model.dtype)
    given = Likeliest(*model.ops.largest(logits)) if (once := model.at_once) is not None and once.screened else logits
    return best_seconds(lambda: sample(given, asks, model.ops))


def _parts(
    config: ModelConfig, work: Work, taken: Mapping[str, float], weights: float, whole: float, draw_s: float, screened: bool
) -> list[Part]:
    from waypost.measure.flops import decode_flops, mean_keys, prefill_flops
    from waypost.model.mixer import Attention

    context = work.prompt_tokens + STEPS // 2 if work.streams else 0
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, Attention)]
    after = context if work.streams else work.prompt_tokens - 1  # tokens before the row that is answered
    last = [min(after + 1.0, m.window or after + 1) for m in mixers]
    every = last if work.streams else [mean_keys(work.prompt_tokens, m.window) for m in mixers]
    per_key = [4.0 * m.num_attention_heads * m.head_dim for m in mixers]
    keys = [work.rows * k for k in every]
    if not work.streams:
        keys[-1] = last[-1]  # nobody reads what the last layer makes of the other rows
    attention = sum(f * k for f, k in zip(per_key, keys, strict=True))
    head = 2.0 * config.hidden_size * config.vocab_size
    counted = work.streams * decode_flops(config, after) if work.streams else prefill_flops(config, work.prompt_tokens)
    products = counted - attention - work.heads * head
    cached = work.streams * sum(4.0 * m.num_key_value_heads * m.head_dim * k for m, k in zip(mixers, last, strict=True))
    rest = whole - sum(taken.values()) - draw_s
    return [
        Part("products of the layers, gates", taken["products"], products, weights),
        Part("attention, rotary positions", taken["attention"], attention, cached),
        Part("norms", taken["norms"]),
        Part("the head, in bytes", taken["head"], work.heads * head, head / 2, pace=2.0)
        if screened
        else Part("the head", taken["head"], work.heads * head, head),
        Part("drawing", draw_s),
        Part("scheduler, batch, requests, interpreter", rest),
    ]
