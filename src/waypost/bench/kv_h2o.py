"""Claim: H2O with a fifth of the keys against all of them: quality first, then memory and speed.

Quality is measured where it is lost: a text's continuation is scored token by token after its beginning went through the
policy, as if it were being written, and the distributions are compared with those over all keys. Beside it stand half the
budget, a window of the same size, and the recall of a number that was said somewhere in a long text. The paper claims
quality kept at 20 % and up to 29x throughput on GPUs, where the saved memory admits larger batches.

Shapes: n tokens of the continuation, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from waypost.bench.pace import paces
from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.train_step import token_rows
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import progress

if TYPE_CHECKING:
    from waypost.model.decoder import Decoder
    from waypost.serve.engine import Engine
    from waypost.serve.request import Delta


@technique
class KvH2O:
    texts: int = 8
    prompt_tokens: int = 512
    new_tokens: int = 128
    needles: int = 8

    def measure(self, options: Options) -> Receipt:
        """One process, an engine a policy; every text on every policy in turn."""
        from waypost.serve.engine import Engine
        from waypost.serve.kv import H2O, Full, KvPolicy
        from waypost.serve.pages import PagedKv

        if options.model is None:
            raise ConfigError("kv.h2o needs --model CHECKPOINT")
        policies: dict[str, KvPolicy] = {
            "full": Full(), "h2o_100": H2O(budget=1.0), "h2o_50": H2O(budget=0.5), "h2o_20": H2O(),
            "window_20": H2O(recent=1.0),
        }  # fmt: skip
        size = {"num_pages": 256, "prefix_cache": False, "drafting": None, "threads": options.threads}
        engines = {name: Engine(options.model, kv_policy=policy, **size) for name, policy in policies.items()}  # type: ignore[arg-type]
        loss: dict[str, list[float]] = {name: [] for name in engines}
        divergence: dict[str, list[float]] = {name: [] for name in engines}
        rows = token_rows(options.model, self.texts, self.prompt_tokens + self.new_tokens)
        with progress("kv.h2o", self.texts + self.needles + options.repeats + 1, "pieces") as bar:
            for tokens in rows:
                found = {name: continuation(engine, tokens, self.prompt_tokens) for name, engine in engines.items()}
                if not torch.equal(found["full"], found["h2o_100"]):
                    raise NumericsError("kv.h2o: with a budget of everything the bits are not those of all keys")
                for name, log_p in found.items():
                    loss[name].append(-log_p[range(self.new_tokens), tokens[self.prompt_tokens :]].mean().item())
                    divergence[name].append((found["full"].exp() * (found["full"] - log_p)).sum(-1).mean().item())
                bar.advance(note=f"perplexity {math.exp(loss['full'][-1]):.1f} and {math.exp(loss['h2o_20'][-1]):.1f}")
            del engines["h2o_100"]
            recalled = self._recall(engines, options.model, bar)
            pair = {name: engines[name] for name in ("full", "h2o_20")}
            speed = paces(pair, rows[0][: self.prompt_tokens], self.new_tokens, options.repeats, bar.advance)
            page_mb = PagedKv.page_bytes(engines["full"].model.config, engines["full"].dtype) / 1e6
            speed |= {f"cache_mb_{name}": speed.pop(f"pages_{name}") * page_mb for name in pair}
        extra = {f"kl_{name}_nats": mean(values) for name, values in divergence.items() if name not in ("full", "h2o_100")}
        extra |= {f"perplexity_{name}": math.exp(mean(values)) for name, values in loss.items() if name != "h2o_100"}
        extra |= {f"recall_{name}": value for name, value in recalled.items()} | speed
        return Receipt(
            claim="kv.h2o",
            statement=f"perplexity of {self.new_tokens} tokens after {self.prompt_tokens}, {self.texts} texts, H2O with "
            "20 % of the keys, against all keys",
            numerics="exact, relative to the policy",
            ours=series("H2O, 20 %", "perplexity", [math.exp(x) for x in loss["h2o_20"]]),
            baseline=series("all keys", "perplexity", [math.exp(x) for x in loss["full"]]),
            higher_is_better=False,
            floor=None,
            over="texts",
            agreement=f"a budget of 100 % gives the logits of all keys to the bit, {self.texts * self.new_tokens} rows",
            command="waypost bench kv.h2o --model CHECKPOINT",
            extra=extra,
        )

    def _recall(self, engines: dict[str, Engine], model: str, bar: Any) -> dict[str, float]:
        """Share of numbers, said once in a text, of which every digit is the likeliest when they are asked for."""
        from waypost.model.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(model)
        text = token_rows(model, self.needles, self.prompt_tokens)
        right = dict.fromkeys(engines, 0)
        for number, row in enumerate(text):
            secret = tokenizer.encode(f" {48271 * (number + 1) % 90000 + 10000}")
            said = [*tokenizer.encode("\n\nThe pass key is"), *secret, *tokenizer.encode(". Remember it.\n\n")]
            depth = (number + 1) * (len(row) - 100) // (self.needles + 1)
            question = tokenizer.encode("\n\nWhat is the pass key? The pass key is")
            prompt = row[:depth] + said + row[depth : len(row) - 100]
            for name, engine in engines.items():  # the policy acts before the question is asked
                log_p = continuation(engine, prompt + question + secret, len(prompt))
                right[name] += log_p[len(question) :].argmax(-1).tolist() == secret
            bar.advance()
        return {name: count / self.needles for name, count in right.items()}


@dataclass
class Distributions:
    """A reader (serve/ledger.py) of log-probabilities (n, V) from the row `begin` on."""

    begin: int
    found: list[Tensor] = field(default_factory=list)

    def keep(self, begin: int, h: Tensor, model: Decoder) -> None:
        from waypost.model.head import log_softmax

        h = h[max(0, self.begin - begin) :]
        if len(h):
            self.found.append(log_softmax(model.ops.linear(h, model.output_weight), model.ops))

    def reset(self) -> None:
        self.found.clear()

    def finish(self, delta: Delta) -> Delta:
        return delta


def continuation(engine: Engine, tokens: Sequence[int], prompt_tokens: int) -> Tensor:
    """Log-probabilities (n, V) before each token after the first `prompt_tokens`, which count as the prompt: the policy acts
    at its end, then stride by stride, as if the tokens had been drawn. The engine must be idle."""
    from waypost.serve.answer import Answer
    from waypost.serve.eviction import act
    from waypost.serve.forward import run_spans
    from waypost.serve.ledger import LiveSequence
    from waypost.serve.sampling import Sampling
    from waypost.serve.scheduler import advance

    known = list(tokens[:-1])  # nothing is asked after the last
    answer = Answer("scored", 0, known, Sampling(), seed=0, max_tokens=1, eos_ids=(), detokenizer=None)
    reader = Distributions(prompt_tokens - 1)
    sequence = LiveSequence(-1, known, prompt_tokens, answer, reader=reader)
    engine.scheduler.add(sequence)
    with torch.inference_mode():
        while sequence.remaining:
            spans = engine.scheduler.plan()
            run_spans(engine.model, engine.kv, spans)
            advance(spans, len(engine.model.config.layers))
            act(engine.scheduler.ledger.kv_policy, spans, engine.kv, engine.pool)
    found = torch.cat(reader.found)
    engine.scheduler.finish(sequence)
    return found
