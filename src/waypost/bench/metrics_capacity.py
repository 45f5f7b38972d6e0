"""Claim: information capacity is nearly the same for the sizes of a family, where bits per byte is not.

The paper (Yuan et al. 2025, arXiv:2511.08066) claims so over 49 models, with a bias chosen to make it so, and ranks models by
it. Here two sizes are trained from scratch on the same tokens and measured at ever more of them. A gap between the sizes says
little by itself, since a bias moves every value: it is given as a share of what training changes in the same number, which
neither a shift nor a factor moves. That the checkpoints of one size are ordered as their losses are is no finding: at one size
the number falls with the loss by its definition; what can differ is the order across sizes.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, SEQ_LEN, STEP_TOKENS, Lab, Texts
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

SIZES: dict[str, dict[str, Any]] = {
    "small": DENSE,
    "large": {**DENSE, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3},
}
"""0.3 and 1.4 million parameters."""


@dataclass(frozen=True)
class Seen:
    """A checkpoint on the held-out text."""

    bits_per_byte: float
    saved: float
    """Bits a token: those of its UTF-8 less those that the model takes."""
    cost: float
    """Base-two logarithm of the FLOPs of a generated token."""

    def capacity(self, bias: float) -> float:
        """Information capacity with that bias."""
        return (self.saved + bias) / self.cost


@technique
class MetricsCapacity:
    steps: list[int] = field(default_factory=lambda: [20, 40, 80, 160])
    """Of 1,024 tokens, at a constant rate: when a checkpoint is measured."""

    def measure(self, options: Options) -> Receipt:
        """Per seed, a run of each size; every checkpoint is measured on chapters that no run has seen."""
        found: list[dict[str, list[Seen]]] = []
        with (
            tempfile.TemporaryDirectory(prefix="waypost-capacity-") as scratch,
            progress("metrics.capacity", options.repeats * len(SIZES), "runs") as bar,
        ):
            texts = Texts.write(Path(scratch))
            for seed in range(options.repeats):
                lab, sizes = Lab(Path(scratch) / f"seed{seed}", texts, seed, options.threads), {}
                for name, model in SIZES.items():
                    sizes[name] = self._run(lab, name, model)
                    bar.advance(note=f"{name}: {sizes[name][-1].bits_per_byte:.3f} bits per byte")
                found.append(sizes)
        return self._receipt(found)

    def _run(self, lab: Lab, name: str, model: dict[str, Any]) -> list[Seen]:
        every = math.gcd(*self.steps)
        save = {"every_steps": every, "keep_last": self.steps[-1] // every}
        run = lab.train(name, {"model": model}, self.steps[-1], save=save)
        return [_seen(run.folder / f"step-{step:08d}", lab.texts.report) for step in self.steps]

    def _receipt(self, found: Sequence[dict[str, list[Seen]]]) -> Receipt:
        from waypost.measure.metrics.information_capacity import InformationCapacity

        bias = InformationCapacity().bias
        ours, bits, fitted, biases = [], [], [], []
        for sizes in found:
            small, large = sizes["small"], sizes["large"]
            own = fitted_bias(small[-1], large[-1])
            biases.append(own)
            ours.append(gap([s.capacity(bias) for s in small], [s.capacity(bias) for s in large]))
            fitted.append(gap([s.capacity(own) for s in small[:-1]], [s.capacity(own) for s in large[:-1]]))
            bits.append(gap([s.bits_per_byte for s in small], [s.bits_per_byte for s in large]))
        extra = {
            "gap_with_fitted_bias": statistics.median(fitted),
            "fitted_bias": statistics.median(biases),
            "pairs_across_sizes_in_the_order_of_bits": agreeing(found, bias),
            "pairs_across_sizes_with_fitted_bias": statistics.median(
                agreeing([sizes], own) for sizes, own in zip(found, biases, strict=True)
            ),
        }
        for name, (place, step) in product(SIZES, enumerate(self.steps)):
            at = [sizes[name][place] for sizes in found]
            extra[f"{name}_{step}_bits_per_byte"] = statistics.median(s.bits_per_byte for s in at)
            extra[f"{name}_{step}_capacity"] = statistics.median(s.capacity(bias) for s in at)
            extra[f"{name}_{step}_capacity_fitted"] = statistics.median(
                s.capacity(own) for s, own in zip(at, biases, strict=True)
            )
        tokens = STEP_TOKENS * self.steps[-1]
        return Receipt(
            claim="metrics.capacity",
            statement="mean gap between two sizes (0.3 and 1.4 million parameters) at equal tokens, as a share of what "
            f"training to {tokens:,} tokens changes in the same number: information capacity (bias {bias:g}, the paper's) "
            "against bits per byte",
            numerics="exact",
            ours=series("information capacity", "of training's change", ours),
            baseline=series("bits per byte", "of training's change", bits),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="the metric is, to 1e-6, what bits per byte and the bytes of a token give for every checkpoint",
            command="waypost bench metrics.capacity",
            extra=extra,
        )


def gap(small: Sequence[float], large: Sequence[float]) -> float:
    """Mean distance of the two at equal tokens, over the mean distance between the first checkpoint and the last."""
    apart = statistics.mean(abs(a - b) for a, b in zip(small, large, strict=True))
    return apart / statistics.mean(abs(values[-1] - values[0]) for values in (small, large))


def fitted_bias(small: Seen, large: Seen) -> float:
    """The bias with which both have the same information capacity."""
    return (small.saved * large.cost - large.saved * small.cost) / (small.cost - large.cost)


def agreeing(found: Sequence[dict[str, list[Seen]]], bias: float) -> float:
    """Share of the pairs of a small and a large checkpoint that information capacity orders as bits per byte does."""
    pairs = [pair for sizes in found for pair in product(sizes["small"], sizes["large"])]
    same = sum((a.capacity(bias) > b.capacity(bias)) == (a.bits_per_byte < b.bits_per_byte) for a, b in pairs)
    return same / len(pairs)


def _seen(checkpoint: Path, text: Path) -> Seen:
    """What there is to know of a checkpoint. NumericsError where the metric and the evaluation disagree."""
    from waypost.core.config import build
    from waypost.keep.reader import Checkpoint
    from waypost.measure.flops import forward_flops
    from waypost.measure.metrics.information_capacity import InformationCapacity
    from waypost.measure.perplexity import evaluate
    from waypost.model.hf import load
    from waypost.transform.recipe import HeldOut
    from waypost.transform.run import held_out_batches

    held = build(HeldOut, {"path": str(text), "max_tokens": 12288, "seq_tokens": SEQ_LEN})
    batches = held_out_batches(Checkpoint(checkpoint), held)
    model, metric = load(checkpoint), InformationCapacity()
    cost = math.log2(forward_flops(model.config, metric.generated_tokens))
    found = evaluate(model, batches)
    if found.bits_per_byte is None or found.num_bytes is None:
        raise NumericsError("metrics.capacity: the held-out text says nothing of its bytes")
    seen = Seen(found.bits_per_byte, (8.0 - found.bits_per_byte) * found.num_bytes / found.tokens, cost)
    value = metric.measure(model, batches).value
    if abs(seen.capacity(metric.bias) - value) > 1e-6:
        raise NumericsError(f"metrics.capacity: {value} by the metric, {seen.capacity(metric.bias)} from bits per byte")
    return seen
