"""Claims: what exactness costs. The same engine, or trainer, with numerics exact and fast, in turn.

exact keeps the bits of a token independent of what runs beside it; fast takes the fastest operators at hand (kernels/fast.py).
In bfloat16 on a CPU these are the same, as long as PyTorch's products and attention are no faster, which is measured beside it:
the slowest of ours may lose no more than the claim allows.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from waypost.bench import peaks
from waypost.bench.operators import ratios
from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.roofline import config_of
from waypost.bench.serve_batch import score_gap
from waypost.bench.serving import WARM_ROUNDS, WORKERS, Generating, Work
from waypost.bench.train_step import token_rows
from waypost.bench.worker import Worker
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress

SCORED_TOKENS = 48


@technique
class ExactStreams:
    requests: int = 16
    prompt_tokens: int = 64
    steps: int = 47

    def measure(self, options: Options) -> Receipt:
        """Many streams that decode at once."""
        what = f"{self.requests} streams that decode at once in bf16"
        return _serving("exact.streams", what, Work(self.prompt_tokens, self.requests, self.steps), 0.90, options)


@technique
class ExactPrefill:
    prompt_tokens: int = 512

    def measure(self, options: Options) -> Receipt:
        """One prompt."""
        what = f"prefill of a prompt of {self.prompt_tokens} tokens in bf16"
        return _serving("exact.prefill", what, Work(self.prompt_tokens), 0.90, options)


@technique
class ExactStream:
    prompt_tokens: int = 64
    steps: int = 63

    def measure(self, options: Options) -> Receipt:
        """One stream that decodes."""
        return _serving(
            "exact.stream", "one stream that decodes in bf16", Work(self.prompt_tokens, 1, self.steps), 0.75, options
        )


@technique
class ExactStep:
    rows: int = 2
    seq_len: int = 512

    def measure(self, options: Options) -> Receipt:
        """A training step."""
        model, tokens = _model("exact.step", options), self.rows * self.seq_len
        args = {"model": model, "rows": token_rows(model, self.rows, self.seq_len)}
        rates: list[tuple[float, ...]] = []
        with ExitStack() as stack:
            sides = [
                stack.enter_context(Worker(WORKERS / "train_waypost.py", {**args, "numerics": name}, options.threads))
                for name in ("exact", "fast")
            ]
            bar = stack.enter_context(progress("exact.step", options.repeats + 1, "rounds"))
            losses = [side.call("step")["loss"] for side in sides]
            if abs(losses[0] - losses[1]) > 0.02 * losses[1]:
                raise NumericsError(f"exact.step: the losses of the first step, {losses[0]:.4f} and {losses[1]:.4f}, differ")
            bar.advance()
            for _ in range(options.repeats):
                rates.append(tuple(tokens / side.call("step")["seconds"] for side in sides))
                bar.advance()
        agreement = f"loss of the first step {losses[0]:.4f} and {losses[1]:.4f}"
        what = f"a training step of {self.rows}x{self.seq_len} tokens in bf16"
        return _receipt("exact.step", what, "tokens/s", rates, None, agreement)


def _serving(claim: str, what: str, work: Work, floor: float, options: Options) -> Receipt:
    import torch

    model = _model(claim, options)
    prompts = token_rows(model, work.streams, work.prompt_tokens)
    with ExitStack() as stack:
        exact, fast = (
            stack.enter_context(Worker(WORKERS / "serve_waypost.py", {"model": model, "numerics": name}, options.threads))
            for name in ("exact", "fast")
        )
        gap = score_gap(exact, fast, prompts[0], SCORED_TOKENS)
        bar = stack.enter_context(progress(claim, options.repeats + WARM_ROUNDS, "rounds"))
        rates: list[tuple[float, ...]] = []
        for _ in range(options.repeats + WARM_ROUNDS):
            rates.append(tuple(work.rate(Generating(side), prompts) for side in (exact, fast)))
            bar.advance(note=f"{rates[-1][0]:.0f} and {rates[-1][1]:.0f} {work.unit}")
    torch.set_num_threads(options.threads)  # for the peaks, and the operators too
    ceiling = work.ceiling(model, peaks.measure())
    if work.steps:
        shape = work.streams, work.streams, work.prompt_tokens + work.steps // 2
    else:
        shape = work.prompt_tokens, 1, 0
    beside = {f"{name}_speedup": ratio for name, ratio in ratios(config_of(model), *shape, options.repeats).items()}
    agreement = f"mean difference of log p over {SCORED_TOKENS} greedy tokens {gap:.4f} nats (bf16)"
    receipt = _receipt(claim, what, work.unit, rates[WARM_ROUNDS:], floor, agreement)
    lowest = {"lowest_operator_speedup": min(beside.values())}
    return replace(receipt, roofline=ceiling, extra=lowest | beside, least=dict.fromkeys(lowest, floor))


def _receipt(claim: str, what: str, unit: str, rates: list[tuple[float, ...]], floor: float | None, agreement: str) -> Receipt:
    return Receipt(
        claim=claim,
        statement=f"{what} with numerics exact, against the same in fast (the fastest operators at hand)",
        numerics="exact and fast",
        ours=series("exact", unit, [r[0] for r in rates]),
        baseline=series("fast", unit, [r[1] for r in rates]),
        higher_is_better=True,
        floor=floor,
        agreement=agreement,
        command=f"waypost bench {claim} --model CHECKPOINT",
    )


def _model(claim: str, options: Options) -> str:
    if options.model is None:
        raise ConfigError(f"{claim} needs --model CHECKPOINT in bfloat16")
    return options.model
