"""Claim: AdAdaGrad's growing batch against the batch it begins with and the one it may end with, at equal tokens.

The paper claims, for images, about the loss of small batches in the fewer steps of large ones. Here: a tiny language model
under AdamW, each side at the best rate of a sweep of its own, the held-out loss against tokens, and the steps that it took.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.pretraining import TUNING_SEED, Lab, Outcome, Tuned, chosen, tuned
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

RATES = (0.002, 0.004, 0.008)
"""For the small batch and the growing one, which begins with it; the large one takes them times the root of their quotient."""


@technique
class TrainAdAdaGrad:
    tokens: int = 81920
    least_tokens: int = 1024
    """Of a step at the beginning, in eight micro-batches."""
    most_tokens: int = 8192
    eta: float = 0.3

    def measure(self, options: Options) -> Receipt:
        """Per seed the growing batch, the small one and the large one, in turn."""
        grows = {"name": "adadagrad", "tokens": self.least_tokens, "max_tokens": self.most_tokens, "eta": self.eta, "every": 8}
        sides: dict[str, dict[str, Any]] = {
            "grows": grows,
            "small": {"name": "fixed", "tokens": self.least_tokens},
            "large": {"name": "fixed", "tokens": self.most_tokens},
        }
        found: dict[str, list[Outcome]] = {side: [] for side in sides}
        rates: dict[str, Tuned] = {}
        with (
            tempfile.TemporaryDirectory(prefix="waypost-batch-") as scratch,
            progress("train.batch", options.repeats + 1) as bar,
        ):
            lab = Lab(Path(scratch), self.tokens, options.threads)
            for side, batch in sides.items():
                rates[side] = self._sweep(lab, side, batch)
            bar.advance(note=", ".join(f"{side} {one.rate:.3g}" for side, one in rates.items()))
            for seed in range(options.repeats):
                for side, batch in sides.items():
                    found[side].append(self._run(lab, side, batch, seed, rates[side].rate))
                if found["grows"][-1].first_loss != found["small"][-1].first_loss:
                    raise NumericsError("train.adadagrad: the first step is not that of the fixed batch")
                bar.advance(note=", ".join(f"{side} {o[-1].loss:.3f} in {o[-1].steps}" for side, o in found.items()))
        return self._receipt(found, rates)

    def _sweep(self, lab: Lab, side: str, batch: dict[str, Any]) -> Tuned:
        scale = math.sqrt(batch["tokens"] / self.least_tokens)
        return tuned([scale * rate for rate in RATES], lambda rate: self._run(lab, side, batch, TUNING_SEED, rate).loss)

    def _run(self, lab: Lab, side: str, batch: dict[str, Any], seed: int, rate: float) -> Outcome:
        optimizer = {"name": "adamw", "lr": rate}
        return lab.run(f"{side}-{rate:.6g}", seed, optimizer, batch, micro_tokens=self.least_tokens // 8)

    def _receipt(self, found: dict[str, list[Outcome]], rates: dict[str, Tuned]) -> Receipt:
        losses = {side: [outcome.loss for outcome in outcomes] for side, outcomes in found.items()}
        extra = {f"{side}_nats": series(side, "", values).median for side, values in losses.items()}
        extra |= {f"{side}_steps": series(side, "", [float(o.steps) for o in runs]).median for side, runs in found.items()}
        extra |= {f"{side}_s": min(o.seconds for o in runs) for side, runs in found.items()}
        extra |= chosen(rates)
        return Receipt(
            claim="train.adadagrad",
            statement=f"held-out loss of a tiny model after {self.tokens:,} tokens under AdamW: a batch that grows by the norm "
            f"test (eta {self.eta:g}) from {self.least_tokens:,} to at most {self.most_tokens:,} tokens, against "
            f"{self.least_tokens:,} throughout; {self.most_tokens:,} throughout and the steps of each beside it; each at the "
            "best rate of a sweep on another seed",
            numerics="exact",
            ours=series("adadagrad", "nats/token", losses["grows"]),
            baseline=series("fixed, small", "nats/token", losses["small"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="the first step is that of the small fixed batch, to the bit",
            command="waypost bench train.adadagrad",
            extra=extra,
        )
