"""Claim: a mixture of 4 experts grown to 8 by copying the useful ones, against going on with 4, and 8 from scratch.

The paper claims that a grown mixture reaches one of its size trained from scratch at two thirds of the cost, and that choosing
the copied experts by gradients triples what a short second phase gains over copying all alike. Here it is tried on a tiny
language model: experts chosen by the squared gradient, by weight norm, and all alike; top-k stays, so copies push other experts
out of it and the loss jumps at the start, which is measured. Going on with 4 keeps its moments; grown models warm up again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import SEQ_LEN, Lab, Texts, mixture
from waypost.core.config import technique
from waypost.core.progress import progress

WAYS: dict[str, dict[str, Any]] = {
    "gradient": {"utility": "gradient_squared"},
    "weight_norm": {"utility": "weight_norm"},
    "all_alike": {"utility": "weight_norm", "max_duplicates": 1},
}


@technique
class UpcycleExperts:
    first_steps: int = 160
    """Of the mixture with few experts, at a constant rate."""
    steps: int = 160
    """Of the second phase; the rate falls to zero over its last third."""
    num_experts: int = 4
    factor: int = 2

    def measure(self, options: Options) -> Receipt:
        """Per seed: the small mixture, then every way on from it."""
        found: dict[str, list[float]] = {}
        with (
            tempfile.TemporaryDirectory(prefix="waypost-experts-") as scratch,
            progress("upcycle.experts", options.repeats) as bar,
        ):
            texts = Texts.write(Path(scratch))
            for seed in range(options.repeats):
                numbers = self._seed(Lab(Path(scratch) / f"seed{seed}", texts, seed, options.threads))
                for what, value in numbers.items():
                    found.setdefault(what, []).append(value)
                bar.advance(note=", ".join(f"{what} {values[-1]:.4f}" for what, values in found.items()))
        return self._receipt(found)

    def _seed(self, lab: Lab) -> dict[str, float]:
        from waypost.transform.run import run as transform

        parent = lab.train("parent", {"model": mixture(self.num_experts)}, self.first_steps)
        start = {"init": {"checkpoint": str(parent.checkpoint), "optimizer": True}}
        both, frac = self.first_steps + self.steps, self.steps / (self.first_steps + self.steps) / 3
        runs = {
            "small": lab.train("small", start, self.steps, before=self.first_steps, decay_frac=1 / 3),
            "scratch": lab.train("scratch", {"model": mixture(self.num_experts * self.factor)}, both, decay_frac=frac),
        }
        numbers = {"parent": lab.loss(parent.checkpoint)}
        held = {"path": str(lab.texts.search), "max_tokens": 8192, "seq_tokens": SEQ_LEN}
        for name, fields in WAYS.items():
            method = {"name": "expert_upcycling", "factor": self.factor, "seed": lab.seed, **fields}
            made = transform(
                {"sources": [str(parent.folder)], "method": method, "held_out": held}, lab.folder / f"{name}-start"
            )
            runs[name] = lab.train(name, {"init": {"checkpoint": str(made.path)}}, self.steps, decay_frac=1 / 3)
            numbers[f"{name}_at_start"] = lab.loss(made.path)
        numbers |= {name: lab.loss(run.checkpoint) for name, run in runs.items()}
        numbers["cost_of_scratch"] = runs["scratch"].seconds / (parent.seconds + runs["gradient"].seconds)
        for name in ("small", "scratch", *WAYS):
            numbers |= {f"load_max_{name}": runs[name].loads[0], f"load_min_{name}": runs[name].loads[1]}
        return numbers

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        grown = self.num_experts * self.factor
        names = {what: what if what.startswith(("load", "cost")) else f"{what}_nats" for what in found}
        return Receipt(
            claim="upcycle.experts",
            statement=f"held-out loss of a tiny mixture grown from {self.num_experts} to {grown} experts (top 2) after "
            f"{self.first_steps} steps, copies chosen by the squared gradient, and trained for {self.steps} more, against "
            f"going on with {self.num_experts} at equal tokens; {grown} from scratch with the tokens of both phases beside it",
            numerics="exact",
            ours=series(f"{grown} by gradient", "nats/token", found["gradient"]),
            baseline=series(f"{self.num_experts}, trained on", "nats/token", found["small"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="every expert of the grown mixture has the bytes of one of the small one's",
            command="waypost bench upcycle.experts",
            extra={names[what]: series(what, "", values).median for what, values in found.items()},
        )
