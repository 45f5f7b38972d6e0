"""Claim: `waypost plan` says beforehand how long a step will take.

Both sides of the comparison are predictions, against the median step of a run after its first. Ours is what `waypost plan`
prints, from trying one layer and two; it is asked before the run and again after it, and the mean of both counts, so that what
else the machine does meets plan and run alike. The baseline is the rule of 6 operations a parameter and token (Kaplan et al.
2020, arXiv:2001.08361, sec. 2.1) at the rate of the best matrix product that was measured, which is what a run cannot beat.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from waypost.bench.plans import LONGEST, SMALL, TINY, direction, planned, prepared, recipe_of, setting, trained
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.progress import progress

RULE_FLOPS = 6
"""A parameter and token, forward and backward."""

SETTINGS: Mapping[str, dict[str, Any]] = {
    "tiny_fp32_plain_adamw_512": setting(TINY, "fp32", "plain", "adamw", 512),
    "tiny_fp32_recompute_adamw_2048": setting(TINY, "fp32", "recompute", "adamw", 2048),
    "tiny_bf16_plain_adamw_512_two_micro": setting(TINY, "bf16", "plain", "adamw", 512, LONGEST // 2),
    "tiny_bf16_stream_bp_muon_2048": setting(TINY, "bf16", "stream_bp", "muon", 2048),
    "small_bf16_plain_adamw_512": setting(SMALL, "bf16", "plain", "adamw", 512),
}


@technique
class PlanTime:
    steps: int = 6
    worst: float = 0.2
    """What the claim promises: the median error over the settings, as a share of what was measured."""

    def measure(self, options: Options) -> Receipt:
        """Each setting is planned, trained and planned again, each in a process of its own."""
        errors: list[float] = []
        rule: list[float] = []
        moved: list[float] = []
        extra: dict[str, float] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-plan-") as scratch, progress("plan.time", len(SETTINGS) + 1) as bar:
            folder = Path(scratch)
            tokenizer = prepared(folder, options.threads)
            bar.advance(note="the tokenizer")
            for name, given in SETTINGS.items():
                recipe = recipe_of(folder, {**given, "tokenizer": {"path": tokenizer}}, self.steps, options.threads)
                before = planned(folder, name, recipe)
                lines = trained(folder, name, recipe, self.steps)
                after = planned(folder, name, recipe)
                measured = statistics.median(line["step_seconds"] for line in lines[1:])
                told = [before["step_seconds"], after["step_seconds"]]
                peak = statistics.median(line["flops_per_s"] / line["peak_frac"] for line in lines)
                simple = RULE_FLOPS * before["parameters"] * LONGEST / peak
                errors.append(statistics.mean(told) / measured - 1)
                rule.append(abs(simple / measured - 1))
                moved.append(abs(told[1] / told[0] - 1))
                extra |= {
                    f"{name}_predicted_s": statistics.mean(told),
                    f"{name}_measured_s": measured,
                    f"{name}_rule_s": simple,
                }
                bar.advance(note=f"{name}: {told[0]:.3g} and {told[1]:.3g} of {measured:.3g} s")
        return Receipt(
            claim="plan.time",
            statement=f"error of the seconds a step that waypost plan predicts for {len(SETTINGS)} settings (3 and 29 million "
            "parameters, two precisions, three memory techniques, two optimizers), the mean of two plans around the run, "
            f"against the median of {self.steps} steps without the first; the rule of {RULE_FLOPS} operations a parameter and "
            "token at the best matrix product's rate beside it",
            numerics="exact",
            ours=series("waypost plan", "relative error", list(map(abs, errors))),
            baseline=series(f"{RULE_FLOPS} operations a parameter and token", "relative error", rule),
            higher_is_better=False,
            floor=None,
            limit=self.worst,
            agreement="plan and run read the same recipe file, tokenizer and shards; every run took its steps",
            command="waypost bench plan.time",
            over="settings",
            caveat=f"{direction(errors)}; two plans of a setting differ by {statistics.median(moved):.3f} in the median",
            extra={"error_worst": max(map(abs, errors)), "plans_differ": statistics.median(moved), **extra},
        )
