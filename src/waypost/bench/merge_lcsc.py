"""Claim: a searched combination of a run's last checkpoints against the last one, their averages, and a decayed rate.

The paper claims, for consistency and diffusion models, that searched coefficients beat moving averages, and that undertrained
runs reach what full ones do. Here it is tried on a language model: coefficients are searched on one text, losses are of
another, and the averages to beat are themselves chosen on the text that is searched.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, SEQ_LEN, Lab, Run, Texts
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

EMA_DECAYS = (0.5, 0.7, 0.85, 0.95)


@technique
class MergeLcsc:
    steps: int = 240
    k: int = 8
    """Checkpoints of the window."""
    every_steps: int = 10
    """Between two of them."""
    search_tokens: int = 8192
    iterations: int = 48

    def measure(self, options: Options) -> Receipt:
        """Per seed a run at a constant rate and one that decays; of each, the last, averages and the searched combination."""
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-lcsc-") as scratch, progress("merge.lcsc", options.repeats) as bar:
            texts = Texts.write(Path(scratch))
            for seed in range(options.repeats):
                lab = Lab(Path(scratch) / f"seed{seed}", texts, seed, options.threads)
                for rate, decay in (("constant", 0.0), ("decayed", 0.25)):
                    save = {"every_steps": self.every_steps, "keep_last": self.k}
                    run = lab.train(
                        rate, {"model": DENSE}, self.steps - self.steps % self.every_steps, decay_frac=decay, save=save
                    )
                    for what, loss in self._merges(lab, run).items():
                        found.setdefault(f"{rate}_{what}", []).append(loss)
                bar.advance(note=", ".join(f"{what} {losses[-1]:.4f}" for what, losses in found.items()))
        return self._receipt(found)

    def _merges(self, lab: Lab, run: Run) -> dict[str, float]:
        """Losses on the text that nothing was chosen by."""
        from waypost.transform.run import run as transform

        select = {"name": "last_k", "k": self.k}
        held = {"path": str(lab.texts.search), "max_tokens": self.search_tokens, "seq_tokens": SEQ_LEN}
        methods: dict[str, dict[str, Any]] = {
            "mean": {"name": "soup"},
            "ema": {"name": "lcsc", "decays": list(EMA_DECAYS), "iterations": 0},
            "lcsc": {"name": "lcsc", "iterations": self.iterations, "seed": lab.seed},
        }
        losses = {"last": lab.loss(run.checkpoint)}
        for what, method in methods.items():
            recipe = {"sources": [str(run.folder)], "select": select, "method": method, "held_out": held}
            made = transform(recipe, run.folder.parent / f"{run.folder.name}-{what}")
            losses[what] = lab.loss(made.path)
            if what == "lcsc":
                notes = made.plan.notes
                losses["lcsc_searched"], losses["lcsc_seconds"] = notes["best_loss"], made.seconds
                if notes["best_loss"] > min(notes["seed_losses"]):
                    raise NumericsError("merge.lcsc: on the text it searched, the result is worse than what it began with")
        return losses

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        base = series("EMA, decay chosen", "nats/token", found["constant_ema"])
        extra = {f"{what}_nats": series(what, "", losses).median for what, losses in found.items() if "seconds" not in what}
        gains = [ema - mine for ema, mine in zip(found["constant_ema"], found["constant_lcsc"], strict=True)]
        extra |= {"gain_over_ema_worst_seed": min(gains), "gain_over_ema_best_seed": max(gains)}
        extra["search_s"] = series("", "", found["constant_lcsc_seconds"]).median
        return Receipt(
            claim="merge.lcsc",
            statement=f"loss of a searched combination of the last {self.k} checkpoints of a tiny run at a constant rate, on "
            "text that neither trained nor chose, against the best of four moving averages; the same run decayed beside it",
            numerics="exact",
            ours=series("lcsc", "nats/token", found["constant_lcsc"]),
            baseline=base,
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="on the text it was searched on, never worse than the averages it began with",
            command="waypost bench merge.lcsc",
            extra=extra,
        )
