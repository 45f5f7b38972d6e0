"""Runs from scratch of a tiny model on the shipped text, for claims about how one trains: the same tokens, rows and first
weights for every side of a seed, and a loss on chapters that no run has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from waypost.core.errors import NumericsError, WaypostError

SEQ_LEN = 128
TUNING_SEED = 1000
"""Of the runs by which rates are chosen: other first weights and rows than those of any run that is reported."""
MODEL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
}  # fmt: skip
"""0.4 million parameters with the 1,024 entries of the vocabulary."""


@dataclass(frozen=True)
class Outcome:
    """A run that has ended."""

    loss: float
    """Nats a token on the held-out chapters."""
    first_loss: float
    """Of the first step."""
    steps: int
    seconds: float
    checkpoint: Path


@dataclass(frozen=True)
class Lab:
    """Where runs go; they share the tokenizer and the tokenised shards."""

    folder: Path
    tokens: int
    """Of every run."""
    threads: int

    def run(
        self, name: str, seed: int, optimizer: Mapping[str, Any], batch: Mapping[str, Any], *,
        model: Mapping[str, Any] = MODEL, micro_tokens: int | None = None,
    ) -> Outcome:  # fmt: skip
        """A run at a constant rate after a warm-up over a tenth of the tokens, falling to zero over the last third."""
        from waypost.train.metrics import read_lines
        from waypost.train.run import train

        decay = self.tokens // 3
        schedule = {"name": "wsd", "warmup_tokens": self.tokens // 10, "decay_start_tokens": self.tokens - decay}
        out = self.folder / f"{name}-{seed}"
        result = train(
            {
                "model": dict(model),
                "tokenizer": {"vocab_size": 1024},
                "data": {
                    "sources": [{"path": "builtin:kjv"}], "seq_len": SEQ_LEN, "held_out": {"frac": 0.04},
                    "cache": str(self.folder / "shards"),
                },
                "optimizer": dict(optimizer),
                "schedule": {**schedule, "decay_tokens": decay},
                "batch": dict(batch),
                "micro_tokens": micro_tokens,
                "tokens": self.tokens,
                "save": {"every_steps": 1000000, "keep_last": 1},
                "eval": {"max_tokens": 49152},
                "seed": seed,
                "threads": self.threads,
            },
            out,
        )  # fmt: skip
        if "held_out_loss" not in result.metrics:
            raise WaypostError(f"a run of the claim was stopped after {result.step} steps: there is nothing to compare")
        lines = read_lines(out / "metrics.jsonl")
        return Outcome(result.metrics["held_out_loss"], lines[0]["loss"], result.step, result.seconds, result.checkpoint)


@dataclass(frozen=True)
class Tuned:
    """A rate that was chosen among some."""

    rate: float
    tried: Mapping[float, float]
    """Rate -> loss; infinite where the run diverged."""

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond those tried might still be better."""
        return self.rate in (min(self.tried), max(self.tried))


def tuned(rates: Sequence[float], loss: Callable[[float], float], wider: int = 4) -> Tuned:
    """The rate whose run has the lowest loss. `rates` ascend by one factor; while the best is the lowest or the highest, one
    more is tried beyond it, at most `wider` times. A run that diverges has lost; NumericsError where all do."""
    tried: dict[float, float] = {}
    factor, ahead, best = rates[1] / rates[0], list(rates), 0.0
    while ahead and len(tried) < len(rates) + wider:
        for rate in ahead:
            try:
                tried[rate] = loss(rate)
            except NumericsError:
                tried[rate] = math.inf
        best = min(tried, key=lambda rate: tried[rate])
        if tried[best] == math.inf:
            raise NumericsError(f"every learning rate diverges: {', '.join(f'{rate:g}' for rate in tried)}")
        ahead = [best / factor] * (best == min(tried)) + [best * factor] * (best == max(tried))
    return Tuned(best, tried)


def chosen(found: Mapping[str, Tuned]) -> dict[str, float]:
    """What a receipt says of the rates of its sides: which, of how many, and whether it is the last that was tried."""
    extra = {f"{side}_lr": one.rate for side, one in found.items()}
    extra |= {f"{side}_lrs_tried": float(len(one.tried)) for side, one in found.items()}
    return extra | {f"{side}_lr_is_the_last_tried": 1.0 for side, one in found.items() if one.at_edge}
