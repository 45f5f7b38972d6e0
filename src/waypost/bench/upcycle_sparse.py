"""Claim: a dense model upcycled to a mixture of experts against the dense one trained on, and a mixture from scratch.

The paper claims that upcycled T5 and vision models beat their dense parents continued and mixtures from scratch, at about half
of the parent's cost. Here it is tried on a tiny language model: at equal tokens, at equal time (dense runs as many steps more
as its steps are quicker), and against mixtures from scratch with the tokens of the second phase alone, and of both phases.
The dense parent goes on with its moments, which is its best; the mixture has none and warms up again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, Lab, Run, Texts, mixture
from waypost.core.config import technique
from waypost.core.progress import progress


@technique
class UpcycleSparse:
    first_steps: int = 160
    """Of the dense parent, at a constant rate."""
    steps: int = 160
    """Of the second phase; the rate falls to zero over its last third."""
    num_experts: int = 8
    num_experts_per_tok: int = 2

    def measure(self, options: Options) -> Receipt:
        """Per seed: the parent, then every way on from it."""
        found: dict[str, list[float]] = {}
        largest = 0.0
        with (
            tempfile.TemporaryDirectory(prefix="waypost-upcycle-") as scratch,
            progress("upcycle.sparse", options.repeats) as bar,
        ):
            texts = Texts.write(Path(scratch))
            for seed in range(options.repeats):
                numbers, difference = self._seed(Lab(Path(scratch) / f"seed{seed}", texts, seed, options.threads))
                largest = max(largest, difference)
                for what, value in numbers.items():
                    found.setdefault(what, []).append(value)
                bar.advance(note=", ".join(f"{what} {values[-1]:.4f}" for what, values in found.items()))
        return self._receipt(found, largest)

    def _seed(self, lab: Lab) -> tuple[dict[str, float], float]:
        """(what was found, the largest float64 logit difference between parent and mixture)."""
        from waypost.transform.run import run as transform

        shape = {"num_experts": self.num_experts, "num_experts_per_tok": self.num_experts_per_tok}
        parent = lab.train("parent", {"model": DENSE}, self.first_steps)
        made = transform(
            {"sources": [str(parent.folder)], "method": {"name": "sparse_upcycling", **shape, "seed": lab.seed}},
            lab.folder / "mixture",
        )
        upcycled = lab.train("upcycled", {"init": {"checkpoint": str(made.path)}}, self.steps, decay_frac=1 / 3)
        dense = self._dense(lab, parent, "dense", self.steps)
        more = round(self.steps * max(1.0, upcycled.seconds / dense.seconds))
        model = {"model": mixture(**shape)}
        runs = {
            "upcycled": upcycled,
            "dense_equal_tokens": dense,
            "dense_equal_time": self._dense(lab, parent, "longer", more),
            "scratch_second_phase": lab.train("scratch", model, self.steps, decay_frac=1 / 3),
            "scratch_both_phases": lab.train(
                "both", model, self.first_steps + self.steps, decay_frac=self.steps / (self.first_steps + self.steps) / 3
            ),
        }
        numbers = {name: lab.loss(run.checkpoint) for name, run in runs.items()}
        numbers |= {"parent": lab.loss(parent.checkpoint), "mixture_at_start": lab.loss(made.path)}
        numbers |= {"step_time_ratio": upcycled.seconds / dense.seconds, "dense_equal_time_steps": float(more)}
        for name in ("upcycled", "scratch_both_phases"):
            numbers |= {f"load_max_{name}": runs[name].loads[0], f"load_min_{name}": runs[name].loads[1]}
        return numbers, float(made.receipt.get("float64_logit_diff", made.receipt["max_logit_diff"]))

    def _dense(self, lab: Lab, parent: Run, name: str, steps: int) -> Run:
        start: dict[str, Any] = {"init": {"checkpoint": str(parent.checkpoint), "optimizer": True}}
        return lab.train(name, start, steps, before=self.first_steps, decay_frac=1 / 3)

    def _receipt(self, found: dict[str, list[float]], largest: float) -> Receipt:
        names = {
            what: what if what.startswith(("load", "step", "dense_equal_time_steps")) else f"{what}_nats" for what in found
        }
        extra = {names[what]: series(what, "", values).median for what, values in found.items()}
        steps, dense, ours = (extra[name] for name in ("dense_equal_time_steps", "dense_equal_time_nats", "upcycled_nats"))
        return Receipt(
            claim="upcycle.sparse",
            statement=f"held-out loss of a tiny dense model upcycled to {self.num_experts} experts (top "
            f"{self.num_experts_per_tok}) after {self.first_steps} steps and trained for {self.steps} more, against the dense "
            "model trained on, at equal tokens; at equal time and from scratch beside it",
            numerics="exact",
            ours=series("upcycled", "nats/token", found["upcycled"]),
            baseline=series("dense, equal tokens", "nats/token", found["dense_equal_tokens"]),
            higher_is_better=False,
            floor=None,
            agreement=f"before training the mixture's logits are the parent's to {largest:.0e} in float64",
            command="waypost bench upcycle.sparse",
            over="seeds",
            caveat=f"at equal time ({steps:.0f} steps of the dense model) the dense model is "
            f"{'better' if dense < ours else 'worse'}, {dense:.3f} against {ours:.3f} nats/token",
            extra=extra,
        )
