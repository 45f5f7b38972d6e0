"""Claim: the outlier-safe set (Muon, norms with one gain, projections of the embedding) against AdamW, and Muon alone.

The paper claims, for 1.4 billion parameters and up to 1T tokens, an excess kurtosis of 0.04 instead of 1,818 and a better
model in 4 bits, at about the loss. A tiny model that has seen little may have no outliers yet; what is measured stands here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.bench.pretraining import MODEL, SEQ_LEN, TUNING_SEED, Lab, Outcome, Tuned, chosen, tuned
from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.progress import progress

if TYPE_CHECKING:
    from waypost.core.batch import Batch
    from waypost.model.decoder import Decoder

OSP_MODEL = {**MODEL, "norm_gain": "scalar", "embedding_projection": True}
RATES = (0.002, 0.004, 0.008)


@technique
class TrainOutlierSafe:
    tokens: int = 131072
    step_tokens: int = 1024

    def measure(self, options: Options) -> Receipt:
        """Each side's best rate of a sweep, then every seed at it, the sides in turn; losses, kurtosis, 4-bit losses."""
        sides: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "adamw": (MODEL, {"name": "adamw"}),
            "muon": (MODEL, {"name": "muon"}),
            "osp": (OSP_MODEL, {"name": "muon"}),
        }
        rates: dict[str, Tuned] = {}
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-osp-") as scratch, progress("train.osp", options.repeats + 1) as bar:
            lab = Lab(Path(scratch), self.tokens, options.threads)
            for side, given in sides.items():
                rates[side] = self._sweep(lab, side, *given)
            bar.advance(note=", ".join(f"{side} {one.rate:.3g}" for side, one in rates.items()))
            for seed in range(options.repeats):
                for side, (model, optimizer) in sides.items():
                    outcome = self._run(lab, side, model, optimizer, seed, rates[side].rate)
                    numbers = {"loss": outcome.loss, "step_ms": 1e3 * outcome.seconds / outcome.steps}
                    for what, value in {**numbers, **judged(outcome.checkpoint)}.items():
                        found.setdefault(f"{side}_{what}", []).append(value)
                bar.advance(note=", ".join(f"{what} {values[-1]:.3f}" for what, values in found.items()))
        return self._receipt(found, rates)

    def _sweep(self, lab: Lab, side: str, model: dict[str, Any], optimizer: dict[str, Any]) -> Tuned:
        return tuned(RATES, lambda rate: self._run(lab, side, model, optimizer, TUNING_SEED, rate).loss)

    def _run(self, lab: Lab, side: str, model: dict[str, Any], optimizer: dict[str, Any], seed: int, rate: float) -> Outcome:
        batch = {"name": "fixed", "tokens": self.step_tokens}
        rest = {"rest": {"lr": rate}} if optimizer["name"] == "muon" else {}
        return lab.run(f"{side}-{rate:.6g}", seed, {**optimizer, "lr": rate, **rest}, batch, model=model)

    def _receipt(self, found: dict[str, list[float]], rates: dict[str, Tuned]) -> Receipt:
        extra = {what: series(what, "", values).median for what, values in found.items()}
        extra |= chosen(rates)
        return Receipt(
            claim="train.osp",
            statement=f"held-out loss of a tiny model after {self.tokens:,} tokens: Muon, norms with one gain and projections "
            "of the embedding against AdamW, each at the best rate of a sweep on another seed; excess kurtosis, and what "
            "4 bits add to the loss, beside it",
            numerics="exact",
            ours=series("outlier-safe set", "nats/token", found["osp_loss"]),
            baseline=series("adamw", "nats/token", found["adamw_loss"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="all sides see the same rows and the same held-out chapters",
            command="waypost bench train.osp",
            extra=extra,
        )


def judged(checkpoint: Path) -> dict[str, float]:
    """Excess kurtosis, and the loss that rounding all linears of the layers to 4 bits adds, on the end of the other text."""
    from waypost.measure.metrics.excess_kurtosis import ExcessKurtosis
    from waypost.measure.perplexity import evaluate
    from waypost.model.hf import load

    model = load(checkpoint)
    batches = other_text(checkpoint)
    kurtosis, before = ExcessKurtosis().measure(model, batches).value, evaluate(model, batches).loss
    in_four_bits(model)
    return {"kurtosis": kurtosis, "int4_adds_nats": evaluate(model, batches).loss - before}


def other_text(checkpoint: Path, max_tokens: int = 16384) -> Sequence[Batch]:
    """Chapters of the shipped text that no run learns from."""
    from waypost.data.text import builtin_documents
    from waypost.measure.perplexity import text_batches
    from waypost.model.tokenizer import Tokenizer

    tokenizer, documents, held = Tokenizer.from_folder(checkpoint), [], 0
    for text in builtin_documents("austen"):
        documents.append(tokenizer.encode(text)[: 4 * SEQ_LEN])
        held += len(documents[-1])
        if held >= max_tokens:
            break
    pieces = (ids[at : at + SEQ_LEN] for ids in documents for at in range(0, len(ids), SEQ_LEN))
    return list(text_batches(pieces, 16 * SEQ_LEN))


def in_four_bits(model: Decoder) -> None:
    """Rounds every linear of the layers to the nearest of 16 values in groups of 32 inputs; in place."""
    import torch

    from waypost.model.linear.dense import Linear
    from waypost.transform.quantizing import RoundToNearest

    method = RoundToNearest(bits=4, group_size=32)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, Linear):
                module.weight.copy_(method.quantize(module.weight.float(), None).dense())
