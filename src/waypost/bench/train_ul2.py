"""Claim: UL2's mixture of denoisers against next-token prediction, at equal rows of text.

The paper claims that the mixture beats both a causal model and span corruption across tasks (20B parameters, prefix-LM
decoders and encoder-decoders). Here: what each side gives a token inside a text, to whose right more text follows, and the
next token of a text. The causal model sees what is left of a gap alone; that is all it can use.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, SEQ_LEN, STEP_TOKENS, Lab, Run, Texts, step_ms
from waypost.core.config import technique
from waypost.core.progress import progress

TEXT_IDS, SPECIAL_IDS = 1024, 32
"""The tokenizer's entries, and the ids behind them that both models have: 3 modes, and more sentinels than a row takes."""
MODEL = {**DENSE, "vocab_size": TEXT_IDS + SPECIAL_IDS, "max_position_embeddings": 192}
UL2 = {"name": "ul2", "first_special": TEXT_IDS}
GAPS = {"infill": (3.0, 0.15), "extreme": (8.0, 0.5)}
"""What is filled in: (mean span, share of the tokens)."""


@technique
class TrainUl2:
    steps: int = 256
    """Of 1,024 tokens of text each; sentinels and mode tokens come on top."""

    def measure(self, options: Options) -> Receipt:
        """Both sides of each seed, in turn."""
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-ul2-") as scratch, progress("train.ul2", options.repeats) as bar:
            texts = Texts.write(Path(scratch))
            for seed in range(options.repeats):
                lab = Lab(Path(scratch) / str(seed), texts, seed, options.threads)
                for side, objective in (("causal", {"name": "causal"}), ("ul2", UL2)):
                    run = lab.train(side, {"model": MODEL, "objective": objective}, self.steps)
                    for name, value in {**self._losses(texts, run, side == "ul2"), "step_ms": step_ms(run.folder)}.items():
                        found.setdefault(f"{side}_{name}", []).append(value)
                bar.advance(note=", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()))
        return self._receipt(found)

    def _losses(self, texts: Texts, run: Run, marked: bool) -> dict[str, float]:
        """Nats a token of text on the same tokens: in gaps of each kind, and one after another."""
        from waypost.core.config import build
        from waypost.keep.reader import Checkpoint
        from waypost.model.hf import load
        from waypost.train.objectives import Causal, Ul2
        from waypost.train.objectives.ul2 import Denoiser
        from waypost.transform.recipe import HeldOut
        from waypost.transform.run import held_out_batches

        held = build(HeldOut, {"path": str(texts.report), "max_tokens": 24576, "seq_tokens": SEQ_LEN})
        model, batches = load(run.checkpoint), held_out_batches(Checkpoint(run.checkpoint), held)
        kinds = {name: Denoiser(mode="R" if r < 0.3 else "X", span=mu, rate=r) for name, (mu, r) in GAPS.items()}
        kinds["next_token"] = Denoiser(mode="S", rate=1.0)
        losses = {}
        for name, denoiser in kinds.items():
            objective, total, count = Ul2(first_special=TEXT_IDS, denoisers=[denoiser]), 0.0, 0
            for number, batch in enumerate(batches):
                # Prepared "bytes" say which row of the text each row fills in, counted from 1.
                told = {"bytes": torch.arange(1.0, batch.num_tokens + 1).double()}
                gaps = objective.prepare(replace(batch, token_extras=told), number)
                rows = gaps.token_extras["bytes"].long()
                nll = objective.losses(model, gaps)[rows > 0] if marked else Causal().losses(model, batch)[rows[rows > 0] - 1]
                total, count = total + float(nll.double().sum()), count + len(nll)
            losses[name] = total / count
        return losses

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        medians = {name: series(name, "", values).median for name, values in found.items()}
        return Receipt(
            claim="train.ul2",
            statement=f"loss of held-out tokens in gaps of 3 (15% of the text) after {self.steps * STEP_TOKENS:,} tokens (tiny "
            "model from scratch): UL2, which sees both sides of a gap, against next-token prediction, which sees the left one; "
            "loss of next tokens (after [S] for UL2) and in gaps of 8 (half of the text) beside it",
            numerics="exact",
            ours=series("ul2", "nats/token", found["ul2_infill"]),
            baseline=series("causal", "nats/token", found["causal_infill"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="both sides are scored on the same tokens and trained on the same rows from the same first weights",
            command="waypost bench train.ul2",
            extra=medians,
        )
