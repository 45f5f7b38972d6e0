"""Claim: many adapters in one batch against no adapter, and against merged models that answer one after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import field
from pathlib import Path

import torch
from torch import Tensor

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.train_step import token_rows
from waypost.core import rng
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress
from waypost.model.adapter_sites import sites
from waypost.model.adapters.lora import Lora
from waypost.model.decoder import Decoder
from waypost.model.peft import LoraFile, write
from waypost.serve.engine import Engine
from waypost.serve.pages import PagedKv
from waypost.serve.request import Completion, Request
from waypost.serve.sampling import Sampling
from waypost.transform.run import transform

RANKS = (4, 8, 16, 32)


@technique
class ServeAdapters:
    requests: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 16
    counts: list[int] = field(default_factory=lambda: [0, 1, 4, 16])
    """Adapters among the requests, of ranks 4, 8, 16 and 32 in turn."""

    def measure(self, options: Options) -> Receipt:
        """Greedy, the same prompts, in turn. What merging and loading the merged models takes is not counted."""
        if options.model is None:
            raise ConfigError("serve.adapters needs --model CHECKPOINT: a full checkpoint, such as one in bfloat16")
        prompts = token_rows(options.model, self.requests, self.prompt_tokens)
        names = [f"a{index}" for index in range(max(self.counts))]
        rates: dict[str, list[float]] = {what: [] for what in (*map(str, self.counts), "merged")}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waypost-adapters-")))
            engine = stack.enter_context(_engine(options.model, options.threads))
            for index, name in enumerate(names):
                engine.adapters.add(name, random_adapter(engine.model, folder / name, RANKS[index % len(RANKS)]))
            plan = {"sources": [options.model], "method": {"name": "lora", "adapter": str(folder / names[-1])}, "verify": False}
            merged = stack.enter_context(_engine(str(transform(plan, folder / "merged")), options.threads))
            bar = stack.enter_context(progress("serve.adapters", options.repeats + 1, "rounds"))
            gap = self._agreement(engine, merged, prompts, names)
            bar.advance()
            for _ in range(options.repeats):
                for count in self.counts:
                    chosen = [names[i % count] if count else None for i in range(self.requests)]
                    rates[f"{count}"].append(self._rate(engine, prompts, chosen))
                began = time.perf_counter()
                for prompt in prompts:
                    self._answer(merged, [prompt], [None])
                rates["merged"].append(self.requests * self.new_tokens / (time.perf_counter() - began))
                bar.advance(note=f"{rates[f'{self.counts[-1]}'][-1]:.0f} tokens/s")
            held = sum(engine.adapters.find(name).num_pages for name in names)
            page_bytes = PagedKv.page_bytes(engine.model.config, engine.dtype)
            weights = sum(parameter.nbytes for parameter in engine.model.parameters())
        most = self.counts[-1]
        return Receipt(
            claim="serve.adapters",
            statement=f"{self.requests} requests at once with {most} adapters of ranks {', '.join(map(str, RANKS))} on every "
            f"projection, {self.prompt_tokens} prompt and {self.new_tokens} new tokens each, against merged models that answer "
            "one after the other",
            numerics="exact",
            ours=series(f"{most} adapters in a batch", "new tokens/s", rates[f"{most}"]),
            baseline=series("merged, one at a time", "new tokens/s", rates["merged"]),
            higher_is_better=True,
            floor=1.5,
            agreement=f"an answer alone has the bits it has in the batch; merged, log p differs by {gap:.4f} nats in the mean",
            command="waypost bench serve.adapters --model CHECKPOINT",
            extra={
                **{f"tokens_per_s_{count}_adapters": sorted(rates[f"{count}"])[options.repeats // 2] for count in self.counts},
                "adapters_mb": held * page_bytes / 1e6,
                "merged_models_mb": most * weights / 1e6,
            },
        )

    def _agreement(self, engine: Engine, merged: Engine, prompts: Sequence[list[int]], names: Sequence[str]) -> float:
        """Mean |difference| of log p between the last adapter and its merged model, over the prompt."""
        together = self._answer(engine, prompts, [names[i % len(names)] for i in range(self.requests)])
        for index in (0, self.requests - 1):
            alone = self._answer(engine, [prompts[index]], [names[index % len(names)]])[0]
            if alone.choices[0].logprobs != together[index].choices[0].logprobs:
                raise NumericsError(f"serve.adapters: request {index} has other bits alone than among the others")
        score = Sampling(max_tokens=0, prompt_logprobs=0)
        sides = [_run(e, [Request(prompts[0], score, adapter=a)])[0] for e, a in ((engine, names[-1]), (merged, None))]
        found = [torch.tensor([s.logprob for s in side.prompt_scores]) for side in sides]
        gap = float((found[0] - found[1]).abs().mean())
        if gap > 0.1:
            raise NumericsError(
                f"serve.adapters: merged, the same tokens score {gap:.3f} nats apart; bf16 does not explain that"
            )
        return gap

    def _rate(self, engine: Engine, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> float:
        began = time.perf_counter()
        self._answer(engine, prompts, adapters)
        return self.requests * self.new_tokens / (time.perf_counter() - began)

    def _answer(self, engine: Engine, prompts: Sequence[list[int]], adapters: Sequence[str | None]) -> list[Completion]:
        sampling = Sampling(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True, logprobs=0)
        return _run(engine, [Request(p, sampling, adapter=a) for p, a in zip(prompts, adapters, strict=True)])


def _engine(model: str, threads: int) -> Engine:
    return Engine(model, threads=threads, prefix_cache=False, num_pages=4096, max_seq_len=1024, drafting=None)


def _run(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    ready = [engine.prepare(request) for request in requests]
    done = {r.id: r.completion() for r in ready}
    for each in ready:
        engine.submit(each)
    while not engine.idle:
        for delta in engine.step():
            done[delta.request_id].add(delta)
            if delta.error is not None:
                raise NumericsError(f"serve.adapters: a request failed: {delta.error}")
    return list(done.values())


def random_adapter(model: Decoder, folder: Path, rank: int) -> Path:
    """Numbers of about the size that training leaves, on every projection of `model`, in PEFT's files."""

    def drawn(*shape: int, name: str, size: float) -> Tensor:
        return size * torch.randn(shape, generator=rng.generator(0, folder.name, name))

    pairs = {}
    for name, linear in sites(model).items():
        outputs, inputs = linear.weight.shape
        a = drawn(rank, inputs, name=f"{name}.a", size=inputs**-0.5)
        pairs[name] = (a, drawn(outputs, rank, name=f"{name}.b", size=0.02))
    return write(folder, LoraFile(folder, pairs, {}, Lora(r=rank, alpha=2.0 * rank).file_config("base")))
