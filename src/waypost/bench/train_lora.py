"""Claim: fine-tuning by LoRA against fine-tuning all weights: what is learned, what is forgotten, and what it takes.

A tiny model learns from one text, then goes on with another. The paper claims the quality of full fine-tuning with up to
10,000 times fewer trained numbers and a third of the memory, on models of 0.1 to 175 billion parameters; that a low rank
learns less of another domain and forgets less of the first is Biderman et al. 2024, arXiv:2405.09673. Bytes are counted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.bench.pretraining import Tuned, chosen, tuned
from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, SEQ_LEN, STEP_TOKENS, Lab, Run, Texts
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

if TYPE_CHECKING:
    from waypost.model.decoder import Decoder

RANKS = {"full": None, "lora_2": 2, "lora_8": 8, "lora_32": 32}
FULL_RATES, LORA_RATES = (0.003, 0.009, 0.027), (0.004, 0.012, 0.036)


@technique
class TrainLora:
    first_steps: int = 320
    """Of the parent, on the King James Bible."""
    steps: int = 160
    """Of every fine-tuning, on Austen; the rate falls to zero over the last third."""

    def measure(self, options: Options) -> Receipt:
        """Each side's best rate on seed 0, by a text that is not reported on, then the other seeds at it; a parent a seed."""
        found: dict[str, list[float]] = {}
        rates: dict[str, Tuned] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-lora-") as scratch, progress("train.lora", options.repeats) as bar:
            home = Path(scratch)
            texts = {}
            for name in ("kjv", "austen"):
                (home / name).mkdir()
                texts[name] = Texts.write(home / name, name)
            for seed in range(options.repeats):
                old, new = (Lab(home / name / f"seed{seed}", each, seed, options.threads) for name, each in texts.items())
                parent = old.train("parent", {"model": DENSE}, self.first_steps).checkpoint
                numbers = {"parent_new_nats": loss(new, parent, None), "parent_old_nats": loss(old, parent, None)}
                for side, rank in RANKS.items():
                    if side not in rates:
                        rates[side] = self._sweep(new, parent, side, rank)
                    checkpoint, step_ms = self._side(new, parent, side, rank, rates[side].rate)
                    numbers |= {f"{side}_nats": loss(new, checkpoint, rank), f"{side}_old_nats": loss(old, checkpoint, rank)}
                    numbers |= {f"{side}_step_ms": step_ms, **{f"{side}_{k}": v for k, v in taken(checkpoint, rank).items()}}
                for what, value in numbers.items():
                    found.setdefault(what, []).append(value)
                bar.advance(note=", ".join(f"{side} {found[f'{side}_nats'][-1]:.3f}" for side in RANKS))
        return self._receipt(found, rates)

    def _sweep(self, lab: Lab, parent: Path, side: str, rank: int | None) -> Tuned:
        def at(rate: float) -> float:
            checkpoint = self._run(lab, parent, f"sweep-{side}", rank, rate).checkpoint
            return lab.loss_of(model_of(checkpoint, rank), checkpoint, lab.texts.search)

        return tuned(FULL_RATES if rank is None else LORA_RATES, at)

    def _run(self, lab: Lab, parent: Path, side: str, rank: int | None, rate: float) -> Run:
        start: dict[str, Any] = {"init": {"checkpoint": str(parent)}}
        if rank is not None:
            start["adapters"] = {"name": "lora", "r": rank, "alpha": 2.0 * rank}
        return lab.train(f"{side}-{rate:.6g}", start, self.steps, decay_frac=1 / 3, lr=rate)

    def _side(self, lab: Lab, parent: Path, side: str, rank: int | None, rate: float) -> tuple[Path, float]:
        """(the checkpoint, milliseconds of a step)."""
        from waypost.keep.reader import Checkpoint

        done = self._run(lab, parent, side, rank, rate)
        if rank is not None:
            before, after = Checkpoint(parent), Checkpoint(done.checkpoint)
            if any(not before.tensor(name).equal(after.tensor(name)) for name in before.names):
                raise NumericsError("train.lora: a weight of the frozen model has moved")
        return done.checkpoint, 1e3 * done.seconds / self.steps

    def _receipt(self, found: dict[str, list[float]], rates: dict[str, Tuned]) -> Receipt:
        extra = {what: series(what, "", values).median for what, values in found.items()}
        extra |= chosen(rates)
        return Receipt(
            claim="train.lora",
            statement=f"held-out loss of a tiny model taught another text for {self.steps * STEP_TOKENS:,} tokens: LoRA of "
            "rank 8 on all projections against all weights, each at the best rate of a sweep; other ranks, the loss on the "
            "first text, trained numbers and bytes beside it",
            numerics="exact",
            ours=series("LoRA, rank 8", "nats/token", found["lora_8_nats"]),
            baseline=series("all weights", "nats/token", found["full_nats"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="every side begins with the parent's weights and sees the same rows; under LoRA they keep every bit",
            command="waypost bench train.lora",
            extra=extra,
        )


def model_of(checkpoint: Path, rank: int | None) -> Decoder:
    """The model of a checkpoint, with its adapter of `rank` (a fresh one where it has none) beside the weights."""
    import torch

    from waypost.keep.reader import Checkpoint
    from waypost.model.adapter_names import is_adapter, stored_name
    from waypost.model.adapters import Lora
    from waypost.model.hf import load

    model = load(checkpoint)
    if rank is None:
        return model
    spec, held = Lora(r=rank, alpha=2.0 * rank), Checkpoint(checkpoint)
    spec.apply(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                known = ("adapter", stored_name(name)) in held.specs
                value = held.tensor(stored_name(name), "adapter") if known else spec.initial_value(name, parameter.shape, 0)
                parameter.copy_(value)
    return model


def loss(lab: Lab, checkpoint: Path, rank: int | None) -> float:
    """Nats a token on the text of `lab` that is reported on."""
    return lab.loss_of(model_of(checkpoint, rank), checkpoint)


def taken(checkpoint: Path, rank: int | None) -> dict[str, float]:
    """Trained numbers; megabytes that the run keeps beside the model's weights (moments, masters, the adapter); the most
    megabytes of tensors in the two passes of a step."""
    import torch

    from waypost.core.batch import Batch
    from waypost.keep.format import num_bytes
    from waypost.keep.reader import Checkpoint
    from waypost.measure.live import LiveBytes
    from waypost.train.memory import Plain
    from waypost.train.objectives import Causal

    model = model_of(checkpoint, rank)
    state = sum(num_bytes(spec) for (role, _), spec in Checkpoint(checkpoint).specs.items() if role != "weight")
    ids = torch.arange(STEP_TOKENS).reshape(-1, SEQ_LEN) % model.config.vocab_size
    ones = torch.ones(SEQ_LEN)
    batch = Batch.of(list(ids), targets=list(ids), weights=[ones] * len(ids))
    with LiveBytes(model.parameters()) as live:
        Plain().forward_backward(model, batch, Causal(), float(STEP_TOKENS))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": float(count), "state_mb": state / 1e6, "passes_mb": live.peak / 1e6}
