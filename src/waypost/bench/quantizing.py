"""What claims about quantisers share: texts that calibrated nothing, and how far a folder's model is from its source on them.

Texts are beginnings of chapters of the shipped novels: those that calibrate are of the first books, those that measure of the
last ones. Quality is counted on all of them, an independent sample each; bytes are those of the weights in the folder.

Shapes: T tokens, N texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from waypost.bench.pace import paces
from waypost.bench.receipt import Options
from waypost.core.config import technique
from waypost.core.errors import ConfigError, NumericsError
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.core.batch import Batch
    from waypost.model.decoder import Decoder

PACED_TOKENS = 256
"""Of the prompt whose speed is measured; a quarter as many are drawn after it."""
NEIGHBOURS = 48
"""Tokens of two texts that are computed beside each other too."""


@technique
class Texts:
    measured: int = 12
    tokens: int = 384
    """Of each text that is measured."""
    calibrating_tokens: int = 4096

    def batches(self, model: str) -> list[Batch]:
        """One batch a text that is measured."""
        from waypost.core.batch import Batch
        from waypost.data.text import builtin_documents
        from waypost.model.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_folder(model)
        ids = [tokenizer.encode(text)[: self.tokens + 1] for text in list(builtin_documents("austen"))[-self.measured :]]
        return [Batch.of([row[:-1]], targets=[row[1:]]) for row in ids]

    def calibration(self, scratch: Path, draw: int) -> dict[str, Any]:
        """A recipe's `calibration`: chapters of the first books, others for each draw."""
        from waypost.data.text import builtin_documents

        path = scratch / f"calibration-{draw}.txt"
        path.write_text("\n\n".join(list(builtin_documents("austen"))[draw * 20 : draw * 20 + 20]), encoding="ascii")
        return {"path": str(path), "max_tokens": self.calibrating_tokens, "seq_tokens": 512}


@dataclass(frozen=True)
class Distance:
    """Of one folder from its source, a number a text."""

    kl: list[float]
    """Nats a token."""
    loss: list[float]
    num_bytes: int
    made_s: float = 0.0
    """Seconds that making it took."""

    @property
    def kl_stderr(self) -> float:
        """Standard error of the mean over texts."""
        spread = sum((x - mean(self.kl)) ** 2 for x in self.kl)
        return math.sqrt(spread / (len(self.kl) - 1) / len(self.kl))


@dataclass(frozen=True)
class Bench:
    """One source, and what is made of it."""

    options: Options
    texts: Texts
    scratch: Path

    def distances(self, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Distance]:
        """Name -> how far the folder that a recipe makes is from the source, which is there as "source". The head is kept."""
        from waypost.model.linear.quantized import load

        torch.set_num_threads(self.options.threads)
        batches, source = self.texts.batches(self.model), load(self.model)
        states = [last_states(source, batch) for batch in batches]
        found = {"source": distance(source, states, source, batches, weight_bytes(self.model))}
        for name, recipe in recipes.items():
            folder, seconds = self.make(name, recipe)
            far = distance(source, states, load(folder), batches, weight_bytes(folder))
            found[name] = replace(far, made_s=seconds)
            say(f"{name}: KL {mean(found[name].kl):.4f}, perplexity {math.exp(mean(found[name].loss)):.3f}")
        return found

    @property
    def model(self) -> str:
        """The source; ConfigError where none was given."""
        if self.options.model is None:
            raise ConfigError("claims about quantisers need --model CHECKPOINT")
        return self.options.model

    def paces(self, names: Sequence[str]) -> dict[str, float]:
        """What serving costs: the source and the folders `names`, one prompt and one stream, in turn (bench/pace.py)."""
        from waypost.serve.engine import Engine

        folders = {"source": Path(self.model), **{name: self.scratch / name for name in names}}
        size = {"num_pages": 256, "prefix_cache": False, "drafting": None, "threads": self.options.threads}
        engines = {name: Engine(str(folder), **size) for name, folder in folders.items()}  # type: ignore[arg-type]
        prompt = self.texts.batches(self.model)[0].tokens.tolist()[:PACED_TOKENS]
        found = paces(engines, prompt, PACED_TOKENS // 4, self.options.repeats)
        return {what: value for what, value in found.items() if not what.startswith("pages_")}

    def make(self, name: str, recipe: Mapping[str, Any]) -> tuple[Path, float]:
        """The folder of a recipe, and the seconds that it took."""
        from waypost.transform.quantize import quantize

        done = quantize({"source": self.model, "verify": False, **recipe}, self.scratch / name)
        return done.path, done.seconds


@torch.no_grad()
def last_states(model: Decoder, batch: Batch) -> Tensor:
    """What the head is given, (T, C)."""
    return model(batch, lambda h, rows: model.model.norm(h, rows))


@torch.no_grad()
def distance(source: Decoder, states: Sequence[Tensor], made: Decoder, batches: Sequence[Batch], num_bytes: int) -> Distance:
    """Of `made` from `source`, whose last states are there already. NumericsError where bits depend on a text's neighbours."""
    from waypost.core.batch import Batch
    from waypost.measure.metrics.logit_kl import ROWS, kl_of_logits

    kl, loss, own = [], [], [last_states(made, batch) for batch in batches]
    for p, q, batch in zip(states, own, batches, strict=True):
        assert batch.targets is not None
        far, missed = 0.0, 0.0
        for at, other, targets in zip(p.split(ROWS), q.split(ROWS), batch.targets.split(ROWS), strict=True):
            logits = made.ops.linear(other, made.output_weight)
            far += kl_of_logits(source.ops.linear(at, source.output_weight), logits).sum().item()
            missed -= logits.double().log_softmax(-1).gather(1, targets[:, None]).sum().item()
        kl.append(far / len(p))
        loss.append(missed / len(p))
    pair = Batch.of([batch.tokens[:NEIGHBOURS].tolist() for batch in batches[:2]])
    if not torch.equal(last_states(made, pair), torch.cat([rows[:NEIGHBOURS] for rows in own[:2]])):
        raise NumericsError("a text has other bits beside another text than alone")
    return Distance(kl, loss, num_bytes)


def weight_bytes(folder: str | Path) -> int:
    """Of all tensors of a folder."""
    from waypost.keep.format import num_bytes
    from waypost.keep.reader import Checkpoint

    return sum(num_bytes(spec) for (role, _), spec in Checkpoint(folder).specs.items() if role == "weight")


def figures(found: Mapping[str, Distance]) -> dict[str, float]:
    """What a receipt says of each: KL with its standard error, perplexity as a multiple of the source's, megabytes, and
    the seconds that making it took."""
    source = mean(found["source"].loss)
    extra = {"perplexity_source": math.exp(source), "mb_source": found["source"].num_bytes / 1e6}
    for name, distance in found.items():
        if name != "source":
            extra |= {
                f"kl_{name}_nats": mean(distance.kl),
                f"kl_{name}_stderr": distance.kl_stderr,
                f"perplexity_ratio_{name}": math.exp(mean(distance.loss) - source),
                f"mb_{name}": distance.num_bytes / 1e6,
                f"made_s_{name}": distance.made_s,
            }
    return extra
