"""Claim: sequences of low loss count less in their step, against every token alike.

The paper claims faster convergence, from GPT-2 sizes to 7B, most where data repeats itself (linupper, r from 0.4 to 1).
Here: a tiny model on three pools: the shipped text; the same with a third of the tokens from four chapters, copied again
and again; the same with a fifth of the documents' words shuffled, whose loss stays high though nothing is to be learned.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, STEP_TOKENS, Lab, Texts, step_ms
from waypost.core.config import technique
from waypost.core.progress import progress
from waypost.data.text import BREAK

POOLS = ("repeated", "clean", "shuffled")


def write_pool(texts: Texts, pool: str, folder: Path) -> Texts:
    """The texts with a training file made of theirs."""
    chapters = texts.train.read_text(encoding="ascii").split(BREAK)
    if pool == "repeated":
        half = sum(map(len, chapters)) // 2
        copied, at = chapters[:4], 0
        while half > 0:
            chapters.append(copied[at % 4])
            half, at = half - len(copied[at % 4]), at + 1
    elif pool == "shuffled":
        for index in range(0, len(chapters), 5):
            words = chapters[index].split()
            random.Random(index).shuffle(words)
            chapters[index] = " ".join(words)
    path = folder / f"{pool}.txt"
    path.write_text(BREAK.join(chapters), encoding="ascii")
    return Texts(path, texts.search, texts.report)


@technique
class TrainReweighting:
    steps: int = 96
    """Of 1,024 tokens each; the ratio is of the repeated pool."""
    temperature: float = 0.4
    after_frac: float = 0.2
    """Share of the steps before the losses count."""

    def measure(self, options: Options) -> Receipt:
        """Per seed and pool: both sides in turn."""
        found: dict[str, list[float]] = {}
        after = round(self.after_frac * self.steps) * STEP_TOKENS
        technique = {"name": "loss_based", "temperature": self.temperature, "after_tokens": after}
        sides: dict[str, Any] = {"plain": None, "reweighted": technique}
        with tempfile.TemporaryDirectory(prefix="waypost-reweighting-") as scratch:
            texts = Texts.write(Path(scratch))
            pools = {pool: write_pool(texts, pool, Path(scratch)) for pool in POOLS}
            with progress("train.reweighting", options.repeats * len(POOLS)) as bar:
                for seed in range(options.repeats):
                    for pool, learned in pools.items():
                        lab = Lab(Path(scratch) / f"{pool}-{seed}", learned, seed, options.threads)
                        for side, reweighting in sides.items():
                            run = lab.train(side, {"model": DENSE, "reweighting": reweighting}, self.steps)
                            found.setdefault(f"{pool}_{side}", []).append(lab.loss(run.checkpoint))
                            found.setdefault(f"{side}_step_ms", []).append(step_ms(run.folder))
                        bar.advance(note=", ".join(f"{k} {v[-1]:.3f}" for k, v in found.items() if k.startswith(pool)))
        return self._receipt(found)

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        extra = {name: statistics.median(values) for name, values in found.items() if name.endswith("_ms")}
        for pool in POOLS:  # seed by seed: the seeds differ by more than the sides, so that medians of each side mislead
            pairs = zip(found[f"{pool}_reweighted"], found[f"{pool}_plain"], strict=True)
            extra |= {f"{pool}_gain_seed{seed}_nats": plain - ours for seed, (ours, plain) in enumerate(pairs)}
        return Receipt(
            claim="train.reweighting",
            statement=f"held-out loss after {self.steps} steps of {STEP_TOKENS:,} tokens (tiny model from scratch, a third of "
            f"its text four chapters again and again): sequences of low loss count less (linupper, r = {self.temperature:g}, "
            f"after {self.after_frac:.0%} of the steps), against every token alike; a clean pool and one with a fifth of the "
            "documents shuffled beside it",
            numerics="exact",
            ours=series("reweighted", "nats/token", found["repeated_reweighted"]),
            baseline=series("plain", "nats/token", found["repeated_plain"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="both sides have the same first weights and rows, and equal steps until the losses count",
            command="waypost bench train.reweighting",
            extra=extra,
        )
