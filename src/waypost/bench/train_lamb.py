"""Claim: LAMB against AdamW at equal tokens, with ever larger batches.

The paper claims that LAMB keeps the loss of BERT at batches where others need tuning or fail (32,868 texts). Here a tiny
language model sees the same tokens in ever fewer steps. Both sides choose their rate at each batch, on another seed.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from waypost.bench.pretraining import TUNING_SEED, Lab, Outcome, Tuned, chosen, tuned
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

RATES = {"lamb": (0.02, 0.04, 0.08), "adamw": (0.002, 0.004, 0.008)}
"""For the small batch; a larger one takes them times the root of the quotient of the two, as the paper has it."""


@technique
class TrainLamb:
    tokens: int = 131072
    small_tokens: int = 1024
    """Of a step."""
    large_tokens: int = 8192
    """Of a step; the ratio is of this batch."""

    def measure(self, options: Options) -> Receipt:
        """Per batch and side the best rate of a sweep, then every seed at it, the sides in turn."""
        found: dict[str, list[Outcome]] = {}
        rates: dict[str, Tuned] = {}
        batches = (self.small_tokens, self.large_tokens)
        with tempfile.TemporaryDirectory(prefix="waypost-lamb-") as scratch, progress("train.lamb", options.repeats + 1) as bar:
            lab = Lab(Path(scratch), self.tokens, options.threads)
            for batch in batches:
                for side in RATES:
                    rates[f"{side}_{batch}"] = self._sweep(lab, side, batch)
            bar.advance(note=", ".join(f"{key} {one.rate:.3g}" for key, one in rates.items()))
            for seed in range(options.repeats):
                for batch in batches:
                    for side in RATES:
                        key = f"{side}_{batch}"
                        found.setdefault(key, []).append(_run(lab, side, batch, seed, rates[key].rate))
                    firsts = [found[f"{side}_{batch}"][seed].first_loss for side in RATES]
                    if len(set(firsts)) != 1:
                        raise NumericsError(f"train.lamb: the sides begin at other losses, {firsts}")
                bar.advance(note=", ".join(f"{key} {outcomes[-1].loss:.3f}" for key, outcomes in found.items()))
        return self._receipt(found, rates)

    def _sweep(self, lab: Lab, side: str, batch: int) -> Tuned:
        scale = math.sqrt(batch / self.small_tokens)
        return tuned([scale * rate for rate in RATES[side]], lambda rate: _run(lab, side, batch, TUNING_SEED, rate).loss)

    def _receipt(self, found: dict[str, list[Outcome]], rates: dict[str, Tuned]) -> Receipt:
        losses = {key: [outcome.loss for outcome in outcomes] for key, outcomes in found.items()}
        extra = {f"{key}_nats": series(key, "", values).median for key, values in losses.items()}
        extra |= chosen(rates)
        extra |= {f"{key}_step_ms": 1e3 * min(o.seconds / o.steps for o in outcomes) for key, outcomes in found.items()}
        largest = self.large_tokens
        return Receipt(
            claim="train.lamb",
            statement=f"held-out loss after {self.tokens:,} tokens in steps of {largest:,} (a tiny model from scratch, "
            f"{self.tokens // largest} steps; of {self.small_tokens:,} beside it), LAMB against AdamW, each at the best rate "
            "of a sweep on another seed",
            numerics="exact",
            ours=series("lamb", "nats/token", losses[f"lamb_{largest}"]),
            baseline=series("adamw", "nats/token", losses[f"adamw_{largest}"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="both sides have the same first weights and rows: their first losses are equal to the bit",
            command="waypost bench train.lamb",
            extra=extra,
        )


def _run(lab: Lab, side: str, batch: int, seed: int, rate: float) -> Outcome:
    return lab.run(f"{side}-{batch}-{rate:.6g}", seed, {"name": side, "lr": rate}, {"name": "fixed", "tokens": batch})
