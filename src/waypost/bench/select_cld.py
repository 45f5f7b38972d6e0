"""Claim: half of a pool, chosen by CLD, against half of it at random.

The paper claims, on images, that such subsets match or beat others and come within 1% of the best. Here: the chapters of a
book, of which every fourth has its words shuffled; a run on all of them gives the checkpoints. What is planted is known, so
the score is also judged alone: how often a whole chapter has a higher one than a shuffled chapter.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from waypost.bench.receipt import Options, Receipt, series
from waypost.bench.tiny_runs import DENSE, SEQ_LEN, STEP_TOKENS, Lab, Texts
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress
from waypost.data.selectors import Documents
from waypost.data.selectors.cld import Cld
from waypost.data.text import BREAK

if TYPE_CHECKING:
    from waypost.train.selection import Selection

NUM_CHAPTERS, PLANTED_EVERY = 96, 4


@technique
class AtRandom:
    """A selector that knows nothing."""

    seed: int

    def score(self, documents: Documents) -> NDArray[np.float64]:
        return np.random.default_rng(self.seed).random(len(documents.num_tokens))


@technique
class SelectCld:
    steps: int = 96
    """Of every run, of 1,024 tokens each."""
    checkpoints: int = 12
    """Of the run whose losses are read."""
    skip: int = 2
    """Of these, left out at the start."""
    keep: float = 0.5

    def measure(self, options: Options) -> Receipt:
        """Per seed: a run on the pool, then on each half of it, for as many steps."""
        found: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory(prefix="waypost-select-") as scratch, progress("select.cld", options.repeats) as bar:
            texts, planted = _pool(Path(scratch))
            for seed in range(options.repeats):
                for name, value in self._seed(Path(scratch), texts, planted, seed, options.threads).items():
                    found.setdefault(name, []).append(value)
                bar.advance(note=", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()))
        return self._receipt(found)

    def _seed(self, home: Path, texts: Texts, planted: NDArray[np.bool_], seed: int, threads: int) -> dict[str, float]:
        from waypost.train.recipe import resolve
        from waypost.train.run import train
        from waypost.train.selection import select

        lab, folder = Lab(home, texts, seed, threads), home / str(seed)
        pool = {"path": str(texts.train), "separator": BREAK}
        whole = self._recipe([pool], {"vocab_size": 1024}, home, seed, threads)
        run = train(whole, folder / "all")
        found = {"all_nats": lab.loss(run.checkpoint), "run_s": run.seconds}
        for side, selector in (("cld", Cld(skip=self.skip)), ("random", AtRandom(seed=seed))):
            chosen = select(resolve(whole), folder / "all", folder / f"{side}-texts", selector, self.keep, str(texts.search))
            recipe = self._recipe(chosen.sources, {"path": str(run.checkpoint)}, home, seed, threads)
            found[f"{side}_nats"] = lab.loss(train(recipe, folder / side).checkpoint)
            found[f"{side}_shuffled_frac"] = float(planted[list(_scores(chosen))].mean())
        for skip in (0, self.skip):  # losses are there already
            every = select(resolve(whole), folder / "all", folder / "cld-texts", Cld(skip=skip), 1.0, str(texts.search))
            scores = np.array([score for _, score in sorted(_scores(every).items())])
            found[f"area_skip_{skip}"] = float((scores[~planted][:, None] > scores[planted][None]).mean())
        if found["cld_nats"] == found["random_nats"]:
            raise NumericsError("select.cld: both halves gave one loss; the choice did not reach the run")
        return found

    def _recipe(self, sources: list[Any], tokenizer: dict[str, Any], home: Path, seed: int, threads: int) -> dict[str, Any]:
        return {
            "model": DENSE, "tokenizer": tokenizer,
            "data": {"sources": sources, "seq_len": SEQ_LEN, "held_out": {"frac": 0.0}, "cache": str(home / "shards")},
            "optimizer": {"name": "adamw", "lr": 4e-3}, "batch": {"name": "fixed", "tokens": STEP_TOKENS},
            "schedule": {"name": "wsd", "warmup_tokens": 16 * STEP_TOKENS, "decay_start_tokens": None},
            "steps": self.steps, "seed": seed, "threads": threads,
            "save": {"every_steps": self.steps // self.checkpoints, "keep_last": self.checkpoints},
        }  # fmt: skip

    def _receipt(self, found: dict[str, list[float]]) -> Receipt:
        extra = {name: statistics.median(values) for name, values in found.items()}
        return Receipt(
            claim="select.cld",
            statement=f"held-out loss after {self.steps} steps of {STEP_TOKENS:,} tokens (tiny models) on "
            f"{self.keep:.0%} of a pool, a quarter of it shuffled words: chosen by CLD from {self.checkpoints} checkpoints of "
            f"a run on all of it, the first {self.skip} left out, against at random",
            numerics="exact",
            ours=series("cld", "nats/token", found["cld_nats"]),
            baseline=series("random", "nats/token", found["random_nats"]),
            higher_is_better=False,
            floor=None,
            over="seeds",
            agreement="both halves have the same number of tokens, to a chapter, one tokenizer and the same first weights",
            command="waypost bench select.cld",
            extra=extra,
        )


def _scores(selection: Selection) -> dict[int, float]:
    """Chapter -> score, of those chosen."""
    lines = Path(selection.sources[0]["path"]).read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    return {int(line["origin"].rsplit(":", 1)[1]) - 1: line["score"] for line in told}


def _pool(home: Path) -> tuple[Texts, NDArray[np.bool_]]:
    """The texts, to train on some chapters, every PLANTED_EVERY-th of them shuffled; and which those are."""
    texts = Texts.write(home)
    chapters = texts.train.read_text(encoding="ascii").split(BREAK)
    chosen = chapters[:: max(1, len(chapters) // NUM_CHAPTERS)][:NUM_CHAPTERS]
    planted = np.arange(len(chosen)) % PLANTED_EVERY == 0
    for index in np.flatnonzero(planted).tolist():
        words = chosen[index].split()
        random.Random(index).shuffle(words)
        chosen[index] = " ".join(words)
    path = home / "pool.txt"
    path.write_text(BREAK.join(chosen), encoding="ascii")
    return Texts(path, texts.search, texts.report), planted
