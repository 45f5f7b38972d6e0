"""Claim: the Step Law's learning rate against the best rate of a sweep, far below the sizes that it was fitted on.

The paper claims a loss within 0.1% of the best of a search, for models of 60 million parameters and more. Here 0.3 million
see 131,072 tokens, in steps of the law's batch. The sweep is run on the first seed, its best rate again on the others.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from waypost.bench.pretraining import MODEL, SEQ_LEN, Lab, Outcome, tuned
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import Progress, progress

RATES = (0.001, 0.002, 0.004, 0.008, 0.016)
RECIPE = 0.004
"""What the tiny recipes have; one of the sweep's."""


@dataclass
class _Found:
    """What the runs have given so far."""

    law: list[Outcome] = field(default_factory=list)
    best: list[Outcome] = field(default_factory=list)
    recipe: list[Outcome] = field(default_factory=list)
    sweep: dict[float, float] = field(default_factory=dict)
    """Rate -> loss, on the first seed; a rate that diverged is not in it."""
    batches: dict[int, float] = field(default_factory=dict)
    """Tokens of a step -> loss at the best rate, on the first seed."""
    best_lr: float = 0.0


@technique
class LawsStep:
    tokens: int = 131072

    def measure(self, options: Options) -> Receipt:
        """Seed 0: the sweep, the law's rate, half and twice the law's batch. Other seeds: law, best and recipe in turn."""
        law = self._law()
        rows = max(1, round(law["batch_tokens"] / SEQ_LEN))
        found = _Found()
        runs = len(RATES) + 3 + 3 * (options.repeats - 1)
        with tempfile.TemporaryDirectory(prefix="waypost-law-") as scratch, progress("laws.step", runs) as bar:
            lab = Lab(Path(scratch), self.tokens, options.threads)
            self._search(lab, law["lr"], rows, found, bar)
            for seed in range(1, options.repeats):
                self._repeat(lab, law["lr"], rows, seed, found, bar)
        for seed, sides in enumerate(zip(found.law, found.best, found.recipe, strict=True)):
            if len({outcome.first_loss for outcome in sides}) != 1:
                raise NumericsError(f"laws.step: the sides of seed {seed} begin at other losses")
        return self._receipt(law, rows * SEQ_LEN, found)

    def _law(self) -> dict[str, float]:
        from waypost.model.hf import config_from_hf
        from waypost.plan.laws import Scale
        from waypost.plan.laws.step_law import StepLaw
        from waypost.plan.planning import body_parameters

        return StepLaw().predict(Scale(body_parameters(config_from_hf({**MODEL, "vocab_size": 1024})), self.tokens))

    def _search(self, lab: Lab, law_lr: float, rows: int, found: _Found, bar: Progress) -> None:
        outcomes: dict[float, Outcome] = {}

        def at(rate: float) -> float:
            outcomes[rate] = _run(lab, rate, rows, 0, bar)
            return outcomes[rate].loss

        found.best_lr = tuned(RATES, at).rate
        found.sweep = {rate: outcome.loss for rate, outcome in outcomes.items()}
        found.law.append(_run(lab, law_lr, rows, 0, bar))
        found.best.append(outcomes[found.best_lr])
        found.recipe.append(outcomes[RECIPE])
        for other in (max(1, rows // 2), 2 * rows):
            found.batches[other * SEQ_LEN] = _run(lab, found.best_lr, other, 0, bar).loss

    def _repeat(self, lab: Lab, law_lr: float, rows: int, seed: int, found: _Found, bar: Progress) -> None:
        found.law.append(_run(lab, law_lr, rows, seed, bar))
        best = _run(lab, found.best_lr, rows, seed, bar)
        found.best.append(best)
        if found.best_lr == RECIPE:
            found.recipe.append(best)
            bar.advance()
        else:
            found.recipe.append(_run(lab, RECIPE, rows, seed, bar))

    def _receipt(self, law: dict[str, float], step_tokens: int, found: _Found) -> Receipt:
        ours = series(f"the law's rate, {law['lr']:.3g}", "nats/token", [o.loss for o in found.law])
        best = series(f"the sweep's best, {found.best_lr:g}", "nats/token", [o.loss for o in found.best])
        extra = {"law_lr": law["lr"], "best_lr": found.best_lr, "recipe_lr": RECIPE, "law_batch_tokens": law["batch_tokens"]}
        extra |= {"recipe_nats": series("", "", [o.loss for o in found.recipe]).median}
        extra |= {f"seed0_lr_{rate:g}_nats": loss for rate, loss in found.sweep.items()}
        extra |= {f"seed0_batch_{tokens}_nats": loss for tokens, loss in found.batches.items()}
        return Receipt(
            claim="laws.step",
            statement=f"held-out loss after {self.tokens:,} tokens in steps of {step_tokens:,} (a tiny model from scratch, 200 "
            "times smaller than any that the law was fitted on), AdamW at the Step Law's rate against the best of "
            f"{len(found.sweep)} rates, each twice the one before; the sweep, half and twice the batch beside it, on one seed",
            numerics="exact",
            ours=ours,
            baseline=best,
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="all rates have the same first weights and rows: their first losses are equal to the bit",
            command="waypost bench laws.step",
            extra={name: float(f"{value:.6g}") for name, value in extra.items()},
        )


def _run(lab: Lab, rate: float, rows: int, seed: int, bar: Progress) -> Outcome:
    batch = {"name": "fixed", "tokens": rows * SEQ_LEN}
    outcome = lab.run(f"{rate:.6g}-{rows}", seed, {"name": "adamw", "lr": rate}, batch)
    bar.advance(note=f"seed {seed}, lr {rate:.3g}, {rows * SEQ_LEN} tokens a step: {outcome.loss:.3f}")
    return outcome
