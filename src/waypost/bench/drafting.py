"""Claims: drafts against the same engine without them. Tokens and log-probabilities are equal to the bit, or nothing is timed.

Copying: the source of a module and its beginning once more, which a model of code goes on to repeat: what prompt lookup is
for. Free: the beginning of a chapter. Chat: questions as people ask them. The ratio is that of copying, one stream; the
others stand in the receipt, and the lowest of them is promised too: a drafter that loses must switch itself off. Streams are
timed while all of them are there, and to the end of the last one beside that. The papers claim 2x to 4x on input-grounded
tasks (prompt lookup) and up to 2.5x (ADED), on GPUs.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.train_step import token_rows
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress

if TYPE_CHECKING:
    from waypost.serve.drafting import Drafter
    from waypost.serve.engine import Engine

STREAMS = (1, 8)
QUESTIONS = (
    "How do I make pancakes for four people?",
    "Write a Python function that says whether a word reads the same backwards.",
    "Why is the sky blue?",
    "Name ten animals that live in the sea.",
    "Write a polite letter to my landlord about a broken heater.",
    "What is the difference between a list and a tuple?",
    "Plan three days in Rome for a family.",
    "Rewrite this sentence so that it is kinder: give me the report now.",
)
LOWEST = 0.95
"""What is promised of the setting where drafts help least. Each text is tried: some steps of the 96 that are timed here."""


@technique
class DraftingNGram:
    steps: int = 96

    def measure(self, options: Options) -> Receipt:
        """Prompt lookup."""
        from waypost.serve.drafting import NGram

        return compare("drafting.ngram", "n-gram drafts (prompt lookup)", NGram(), self.steps, options)


@technique
class DraftingTrigram:
    steps: int = 96

    def measure(self, options: Options) -> Receipt:
        """ADED's adaptive tri-gram, as a chain."""
        from waypost.serve.drafting import AdaptiveTrigram

        return compare("drafting.trigram", "adaptive tri-gram drafts (ADED, a chain)", AdaptiveTrigram(), self.steps, options)


def compare(claim: str, what: str, drafter: Drafter, steps: int, options: Options) -> Receipt:
    """One engine, which guesses in every second turn (two of the same code differ by 3%, for where their weights lie); every
    kind of text at one stream and at eight."""
    from waypost.serve.engine import Engine

    if options.model is None:
        raise ConfigError(f"{claim} needs --model CHECKPOINT")
    texts = workloads(options.model, max(STREAMS))
    engine = Engine(options.model, num_pages=1024, prefix_cache=False, threads=options.threads, drafting=drafter)
    rates: dict[str, list[tuple[Rates, Rates]]] = {f"{kind}_{n}": [] for kind in texts for n in STREAMS}
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in rates}
    with progress(claim, options.repeats + 1, "rounds") as bar:
        for prompts in texts.values():
            agree(claim, engine, prompts, steps)
        for turn in range(options.repeats + 1):  # the first round does not count: costs are measured, clocks rise
            for kind, prompts in texts.items():
                for n in STREAMS:
                    with engine.drafts.paused():
                        without = rates_of(engine, prompts, n, steps)
                    before = engine.stats()
                    pair = without, rates_of(engine, prompts, n, steps)
                    after = engine.stats()
                    if turn:
                        rates[f"{kind}_{n}"].append(pair)
                        total = counts[f"{kind}_{n}"]
                        total[0] += after.draft_tokens - before.draft_tokens
                        total[1] += after.accepted_tokens - before.accepted_tokens
                        total[2] += after.num_steps - before.num_steps
            bar.advance()
    accepted = {f"{name}_accepted_share": taken / max(drafted, 1) for name, (drafted, taken, _) in counts.items()}
    accepted |= {f"{name}_drafted_a_step": drafted / max(passed, 1) for name, (drafted, _, passed) in counts.items()}
    headline = rates["copying_1"]
    speedups = {f"{name}_speedup": median(b.together / a.together for a, b in pairs) for name, pairs in rates.items()}
    ends = {
        f"{name}_speedup_to_the_end": median(b.to_the_end / a.to_the_end for a, b in pairs) for name, pairs in rates.items()
    }
    return Receipt(
        claim=claim,
        statement=f"{what}, one stream at a time that repeats the code of its prompt, greedy, against decoding token by token; "
        f"{len(rates)} settings of text and streams beside it",
        numerics="exact",
        ours=series("with drafts", "new tokens/s", [b.together for _, b in headline]),
        baseline=series("without", "new tokens/s", [a.together for a, _ in headline]),
        higher_is_better=True,
        floor=1.0,
        least={"lowest_speedup": LOWEST},
        agreement=f"tokens and log-probabilities equal to the bit, greedy and sampled, {len(texts) * max(STREAMS)} texts",
        command=f"waypost bench {claim} --model CHECKPOINT",
        extra={"lowest_speedup": min(speedups.values()), **speedups, **ends, **accepted},
    )


def workloads(model: str, streams: int) -> dict[str, list[list[int]]]:
    """Kind of text -> prompts of at most some hundreds of tokens."""
    from waypost.core import batch, errors, paths, rng
    from waypost.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model)
    sources = [inspect.getsource(module)[:1200] for module in (rng, errors, batch, paths)]
    chats = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS[:streams]]
    whole = [tokenizer.encode(f"# {i}\n{sources[i % len(sources)]}") for i in range(streams)]
    return {"copying": [ids + ids[: len(ids) // 4] for ids in whole], "free": token_rows(model, streams, 64), "chat": chats}


def agree(claim: str, engine: Engine, prompts: Sequence[list[int]], steps: int) -> None:
    """NumericsError unless tokens and log-probabilities are the same without drafts, greedy and sampled."""
    from waypost.serve.sampling import Sampling

    for temperature in (0.0, 0.8):
        sampling = Sampling(temperature=temperature, max_tokens=steps, seed=1, logprobs=0, ignore_eos=True)
        with engine.drafts.paused():
            plain = [c.choices[0].tokens for c in engine.generate(prompts, sampling)]
        if plain != [c.choices[0].tokens for c in engine.generate(prompts, sampling)]:
            raise NumericsError(f"{claim}: drafts change an answer at temperature {temperature}")


@dataclass(frozen=True)
class Rates:
    """New tokens a second of some streams."""

    together: float
    """While all of them are there: as in a server, where another takes the place of one that ends."""
    to_the_end: float
    """Until the last of them ends; one that runs ahead then leaves small steps behind, which take nearly as long."""


def rates_of(engine: Engine, prompts: Sequence[list[int]], streams: int, steps: int) -> Rates:
    """Of all prompts, so many at a time, each time from the moment at which every stream has its first token."""
    spent = [_spent(engine, prompts[at : at + streams], steps) for at in range(0, len(prompts), streams)]
    together, together_s, tokens, seconds = map(sum, zip(*spent, strict=True))
    return Rates(together / together_s, tokens / seconds)


def _spent(engine: Engine, prompts: Sequence[list[int]], steps: int) -> tuple[int, float, int, float]:
    """Tokens and seconds while all streams are there, and to the end of the last one."""
    from waypost.serve.request import Request
    from waypost.serve.sampling import Sampling

    sampling = Sampling(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    begun = {engine.submit(Request(prompt, sampling)): False for prompt in prompts}
    tokens, began, together = 0, 0.0, (0, 0.0)
    while not engine.idle:
        deltas = engine.step()
        now = time.perf_counter()
        if not began:
            begun.update((delta.request_id, True) for delta in deltas if delta.tokens)
            began = now if all(begun.values()) else 0.0
            continue
        tokens += sum(len(delta.tokens) for delta in deltas)
        if not together[0] and any(delta.finish_reason is not None for delta in deltas):
            together = tokens, now - began
    return *together, tokens, now - began
