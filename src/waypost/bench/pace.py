"""How fast engines of one process answer: in turn, after a round that does not count, every round kept, so that the spread is
known. For claims about quality, beside which the cost has to stand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from waypost.bench.receipt import series

if TYPE_CHECKING:
    from waypost.serve.engine import Engine


def paces(
    engines: Mapping[str, Engine],
    prompt: Sequence[int],
    new_tokens: int,
    repeats: int,
    after: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Of each engine tokens a second of the prompt's prefill and of one stream after it, medians and spreads (half the range
    over the median), and the pages that the prompt holds. `after` is called once a round."""
    found: dict[str, list[float]] = {}
    pages: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, engine in engines.items():
            prefill, decode, pages[f"pages_{name}"] = pace(engine, prompt, new_tokens)
            if turn:  # in the first, caches fill and clocks rise
                found.setdefault(f"prefill_tokens_s_{name}", []).append(prefill)
                found.setdefault(f"decode_tokens_s_{name}", []).append(decode)
        after()
    out = dict(pages)
    for what, rates in found.items():
        one = series("", "", rates)
        out |= {what: one.median, f"{what}_spread": one.spread}
    return out


def pace(engine: Engine, prompt: Sequence[int], new_tokens: int) -> tuple[float, float, float]:
    """(tokens a second until the first new one, tokens a second after it, pages held between the two) of an idle engine."""
    from waypost.serve.request import Request
    from waypost.serve.sampling import Sampling

    engine.submit(Request(list(prompt), Sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)))
    began = time.perf_counter()
    while not any(delta.tokens for delta in engine.step()):
        pass
    first, pages = time.perf_counter(), engine.pool.held
    while not engine.idle:
        engine.step()
    return len(prompt) / (first - began), (new_tokens - 1) / (time.perf_counter() - first), float(pages)
