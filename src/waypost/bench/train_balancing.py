"""Claim: experts balanced over the step's batch against over each micro-batch.

The paper claims a better perplexity (8.17 to 8.04 for 3.4 billion parameters, 5.78 to 5.60 for 15) and experts that specialise,
at hardly any cost. Here: a tiny mixture on the two shipped texts, every micro-batch one row, nearly always of one text.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import SEQ_LEN, STEP_TOKENS, Lab, Run, Texts, mixture, step_ms
from waypost.core.config import technique
from waypost.core.progress import progress
from waypost.data.text import BREAK


def both_texts(folder: Path) -> Texts:
    """The shipped texts in one: what is learned from, chosen by and reported on has chapters of each."""
    texts = []
    for name in ("kjv", "austen"):
        (folder / name).mkdir()
        texts.append(Texts.write(folder / name, name))
    paths = []
    for what in ("train", "search", "report"):
        parts = [getattr(text, what).read_text(encoding="ascii") for text in texts]
        paths.append(folder / f"{what}.txt")
        paths[-1].write_text((BREAK if what == "train" else "\n").join(parts), encoding="ascii")
    return Texts(*paths)


@technique
class TrainBalancing:
    steps: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    coef: float = 0.01

    def measure(self, options: Options) -> Receipt:
        """Per seed: balanced over the step, over each micro-batch, and not at all, in turn."""
        sides: dict[str, dict[str, Any]] = {
            "step": {"coef": self.coef, "over": "step"},
            "micro_batch": {"coef": self.coef, "over": "micro_batch"},
            "none": {"coef": 0.0},
        }
        found: dict[str, list[float]] = {}
        with (
            tempfile.TemporaryDirectory(prefix="waypost-balancing-") as scratch,
            progress("train.balancing", options.repeats * len(sides)) as bar,
        ):
            texts = both_texts(Path(scratch))
            for seed in range(options.repeats):
                lab = Lab(Path(scratch) / f"seed{seed}", texts, seed, options.threads)
                for side, balancing in sides.items():
                    run = self._run(lab, side, balancing)
                    numbers = {"nats": lab.loss(run.checkpoint), "step_ms": step_ms(run.folder)}
                    numbers |= dict(zip(("fullest", "emptiest"), run.loads, strict=True))
                    for what, value in numbers.items():
                        found.setdefault(f"{side}_{what}", []).append(value)
                    bar.advance(note=f"{side} {numbers['nats']:.4f}, fullest {run.loads[0]:.2f}")
        return self._receipt(found)

    def _run(self, lab: Lab, side: str, balancing: dict[str, Any]) -> Run:
        model = mixture(self.num_experts, self.num_experts_per_tok)
        start = {"model": model, "balancing": {"name": "global_batch", **balancing}, "micro_tokens": SEQ_LEN}
        return lab.train(side, start, self.steps, decay_frac=1 / 3)

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        return Receipt(
            claim="train.balancing",
            statement=f"held-out loss of a tiny mixture ({self.num_experts} experts, top {self.num_experts_per_tok}) after "
            f"{self.steps} steps of {STEP_TOKENS:,} tokens from two texts, a row a micro-batch: experts balanced over the step "
            f"against over each micro-batch, at {self.coef:g} both; without balancing, and the loads of the fullest and of the "
            "emptiest expert (1 is even), beside it",
            numerics="exact",
            ours=series("over the step", "nats/token", found["step_nats"]),
            baseline=series("over a micro-batch", "nats/token", found["micro_batch_nats"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="all sides have the same first weights and rows",
            command="waypost bench train.balancing",
            extra={what: statistics.median(values) for what, values in found.items()},
        )
