"""Claim: `waypost plan` says beforehand how much memory a run will take.

Both sides of the comparison are predictions, against the most bytes that the run's process held at once. Ours is what `waypost
plan` prints; the baseline is the rule by which one sizes a machine with Adam: 16 bytes a parameter (Rajbhandari et al. 2020,
ZeRO, arXiv:1910.02054, sec. 3.1), which counts neither activations nor the process. Beside it stands the rule with the bytes of
the process that our plan found, so that what remains is tensors.
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

RULE_BYTES = 16
"""A parameter: weights and gradients in 16 bits, master and two moments in 32; in float32 throughout it is as many."""
SETTINGS: Mapping[str, dict[str, Any]] = {
    "small_fp32_plain_adamw_512": setting(SMALL, "fp32", "plain", "adamw", 512),
    "small_fp32_recompute_adamw_2048": setting(SMALL, "fp32", "recompute", "adamw", 2048),
    "small_bf16_plain_adamw_512_two_micro": setting(SMALL, "bf16", "plain", "adamw", 512, LONGEST // 2),
    "small_bf16_stream_bp_muon_2048": setting(SMALL, "bf16", "stream_bp", "muon", 2048),
    "tiny_fp32_plain_muon_2048": setting(TINY, "fp32", "plain", "muon", 2048),
    "tiny_bf16_recompute_adamw_2048": setting(TINY, "bf16", "recompute", "adamw", 2048),
    "small_fp32_selective_adamw_512": setting(SMALL, "fp32", "selective", "adamw", 512),
    "small_bf16_seco_adamw_2048": setting(SMALL, "bf16", "seco", "adamw", 2048),
    "small_bf16_recompute_muon_512": setting(SMALL, "bf16", "recompute", "muon", 512),
}
CHOSEN_ON = 6
"""The settings that waypost.plan.process.HOLES was chosen on; those after them tell whether it holds elsewhere."""


@technique
class PlanMemory:
    steps: int = 3
    worst: float = 0.07
    """What the claim promises: the median error over the settings, as a share of what was measured."""

    def measure(self, options: Options) -> Receipt:
        """Each setting is planned in one process and trained in another; tokenizer and shards are there before."""
        errors, rule = [], []
        extra: dict[str, float] = {}
        tensors, with_process = [], []
        with tempfile.TemporaryDirectory(prefix="waypost-plan-") as scratch, progress("plan.memory", len(SETTINGS) + 1) as bar:
            folder = Path(scratch)
            tokenizer = prepared(folder, options.threads)
            bar.advance(note="the tokenizer")
            for name, own in SETTINGS.items():
                given = {**own, "tokenizer": {"path": tokenizer}}
                recipe = recipe_of(folder, given, self.steps, options.threads)
                found = planned(folder, name, recipe)
                measured = max(line["peak_rss_bytes"] for line in trained(folder, name, recipe, self.steps))
                simple = RULE_BYTES * found["parameters"]
                process = found["process_bytes"]
                errors.append(found["peak_rss_bytes"] / measured - 1)
                rule.append(abs(simple / measured - 1))
                with_process.append(abs((simple + process) / measured - 1))
                tensors.append(abs(found["memory"]["peak"] / (measured - process) - 1))
                extra |= {f"{name}_predicted_mb": found["peak_rss_bytes"] / 1e6, f"{name}_measured_mb": measured / 1e6}
                extra |= {f"{name}_rule_mb": simple / 1e6, f"{name}_process_mb": process / 1e6}
                extra[f"{name}_holes_mb"] = found["memory"]["holes"] / 1e6
                bar.advance(note=f"{name}: {found['peak_rss_bytes'] / 1e6:.0f} of {measured / 1e6:.0f} MB")
        of_tensors = statistics.median(tensors)
        return Receipt(
            claim="plan.memory",
            statement=f"error of the memory that waypost plan predicts for {len(SETTINGS)} settings (3 and 29 million "
            "parameters, two precisions, five memory techniques, two optimizers), against the most that a process of its own "
            f"held in {self.steps} steps of each; the rule of {RULE_BYTES} bytes a parameter beside it",
            numerics="exact",
            ours=series("waypost plan", "relative error", list(map(abs, errors))),
            baseline=series(f"{RULE_BYTES} bytes a parameter", "relative error", rule),
            higher_is_better=False,
            floor=None,
            limit=self.worst,
            agreement="plan and run read the same recipe file, tokenizer and shards; every run took its steps",
            command="waypost bench plan.memory",
            over="settings",
            caveat=f"{direction(errors)}; the share of passing tensors that stays as holes was chosen on the first "
            f"{CHOSEN_ON}; of tensors alone, without process and holes, the median error is {of_tensors:.3f}",
            extra={
                "error_worst": max(map(abs, errors)),
                "error_of_settings_not_chosen_on": statistics.median(map(abs, errors[CHOSEN_ON:])),
                "error_of_tensors_alone": of_tensors,
                "rule_and_process_error": statistics.median(with_process),
                **extra,
            },
        )
