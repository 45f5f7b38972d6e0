"""A plan of a training run: what it will take, before it starts; and how right that was, after it ran."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from waypost.core.config import Table
from waypost.core.errors import ConfigError
from waypost.keep.disk import human
from waypost.keep.reader import Checkpoint
from waypost.model import hf
from waypost.model.config import ModelConfig
from waypost.model.tokenizer import Tokenizer
from waypost.plan.laws import LAWS, Law, Scale
from waypost.plan.memory import MemoryPlan, memory_plan
from waypost.plan.process import resident_bytes
from waypost.plan.timing import step_seconds
from waypost.train.metrics import read_lines
from waypost.train.prepare import model_config
from waypost.train.recipe import TrainRecipe
from waypost.train.steps import split_step


@dataclass(frozen=True)
class Plan:
    """What a run will take on one rank of this machine."""

    parameters: int
    body_parameters: int
    """Without embedding and head, as laws count them."""
    steps: int
    tokens: int
    micro_tokens: int
    micro_batches: int
    memory: MemoryPlan
    process_bytes: int
    """Of the process beside tensors: the interpreter and its libraries, with the code that a step brings in."""
    step_seconds: float
    lr: float | None
    """The recipe's peak; None where its optimizer has no single one."""
    laws: dict[str, dict[str, float]]
    """What each law says of the run, by its name."""
    doubts: dict[str, str]
    """Why what a law says is a guess at this size; laws that were found with such sizes are not in it."""

    @property
    def seconds(self) -> float:
        """Of all steps; without evaluation, saving and tokenising."""
        return self.steps * self.step_seconds

    @property
    def peak_rss_bytes(self) -> int:
        """Tensors at the fullest moment, what the heap keeps beside them, and the process."""
        return self.memory.peak + self.memory.holes + self.process_bytes

    def expected(self, name: str) -> float | None:
        """What the first law that speaks of `name` says; None where none does."""
        return next((found[name] for found in self.laws.values() if name in found), None)

    def facts(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {**asdict(self), "seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes}

    def text(self) -> str:
        """For a person."""
        m, loss = self.memory, self.expected("loss")
        return "\n".join(
            [
                f"{self.parameters / 1e6:,.1f}M parameters ({self.body_parameters / 1e6:,.1f}M without embedding and head), "
                f"{self.tokens:,} tokens in {self.steps:,} steps of {self.micro_batches} x {self.micro_tokens:,}",
                f"  time     {_duration(self.seconds)}: {self.step_seconds:.3g} s a step, "
                f"{self.tokens / self.steps / self.step_seconds:,.0f} tokens/s (evaluation and saving come on top)",
                f"  memory   {human(self.peak_rss_bytes)} at most: weights {human(m.weights)}, optimizer {human(m.optimizer)}, "
                f"gradients {human(m.gradients)}, activations {human(m.activations)}, holes of the heap {human(m.holes)}, "
                f"the process {human(self.process_bytes)}",
                *(self._law_text(name) for name in self.laws),
                f"  loss     {'no law here predicts it from sizes alone' if loss is None else f'{loss:.3f} nats a token'}",
            ]
        )

    def _law_text(self, name: str) -> str:
        """A law's numbers, beside each what the recipe has where the recipe has such a thing."""
        recipe = {"lr": self.lr, "batch_tokens": float(self.micro_batches * self.micro_tokens)}
        parts = []
        for what, value in self.laws[name].items():
            ours = recipe.get(what)
            parts.append(f"{what} {_short(value)}" + ("" if ours is None else f" (the recipe's {_short(ours)})"))
        return f"  {name:<8} {', '.join(parts)}" + (f"; {self.doubts[name]}" if name in self.doubts else "")


@dataclass(frozen=True)
class Score:
    """One prediction against what was measured."""

    what: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1.0


def plan(recipe: TrainRecipe, laws: Sequence[str] = tuple(LAWS)) -> Plan:
    """The plan of `recipe` on one rank, with what `laws` say, rows of LAWS or "package.module:Name". Reads a tokenizer's or a
    checkpoint's configuration and no data; tries one and two layers to time them."""
    import waypost.train.run  # noqa: F401  # what a run imports is part of its process

    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if recipe.adapters is not None:
        raise ConfigError("plan: adapters are not counted yet in time and memory; plan the recipe without `adapters`")
    chosen: dict[str, Law] = {name: Table("law", LAWS).resolve(name)() for name in laws}
    config = configuration(recipe)
    step_tokens = recipe.batch.next({})
    rows, micro_batches = split_step(step_tokens, recipe.data.seq_len, 1, recipe.micro_tokens)
    micro_tokens = rows * recipe.data.seq_len
    steps = recipe.steps if recipe.steps is not None else -(-(recipe.tokens or 0) // step_tokens)
    memory = memory_plan(recipe, config, micro_tokens, micro_batches)
    own, _ = resident_bytes()  # now that an optimizer was built, though on no memory: torch.optim alone brings 115 MB of code
    seconds = step_seconds(recipe, config, micro_tokens, micro_batches)
    _, files = resident_bytes()  # of libraries, that much more now that a step has run
    sizes = _parameters(config)
    body = body_parameters(config)
    scale = Scale(body, steps * step_tokens)
    doubts = {name: law.doubt(scale) for name, law in chosen.items()}
    lr = getattr(recipe.optimizer, "lr", None)
    return Plan(
        parameters=sum(sizes.values()), body_parameters=body, steps=steps, tokens=steps * step_tokens,
        micro_tokens=micro_tokens, micro_batches=micro_batches, memory=memory, process_bytes=own + files,
        step_seconds=seconds, lr=lr if isinstance(lr, float) else None,
        laws={name: law.predict(scale) for name, law in chosen.items()},
        doubts={name: doubt for name, doubt in doubts.items() if doubt},
    )  # fmt: skip


def configuration(recipe: TrainRecipe) -> ModelConfig:
    """The model's configuration, without tokenising or training a tokenizer."""
    if recipe.init is not None:
        return hf.config_from_hf(Checkpoint(recipe.init.checkpoint).config)
    wanted = recipe.tokenizer
    assert wanted is not None, "TrainRecipe checks that a model from scratch has a tokenizer"
    if wanted.path is not None:
        return model_config(recipe, Tokenizer.from_folder(wanted.path))
    known: Any = SimpleNamespace(vocab_size=wanted.vocab_size, bos_id=None, eos_ids=())
    return model_config(recipe, known)


def body_parameters(config: ModelConfig) -> int:
    """The number of parameters without embedding and head, as laws count them."""
    sizes = _parameters(config)
    return sum(size for name, size in sizes.items() if "embed_tokens" not in name and "lm_head" not in name)


def _parameters(config: ModelConfig) -> dict[str, int]:
    from waypost.model.decoder import Decoder

    with torch.device("meta"):
        return {name: p.numel() for name, p in Decoder(config).named_parameters()}


def score(planned: Plan, folder: Path) -> list[Score]:
    """The plan against the run in `folder`: the median second of its steps, its most bytes, and, where a law predicts one and
    the run has come to the end of the plan, its last loss. ConfigError where none ran."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "step_seconds" in line]
    if not lines:
        raise ConfigError(f"{folder}: has no metrics.jsonl with a step in it; give the folder of a run: --score runs/tiny")
    seconds = [line["step_seconds"] for line in lines[1:] or lines]
    scores = [
        Score("step_seconds", planned.step_seconds, statistics.median(seconds)),
        Score("peak_rss_bytes", planned.peak_rss_bytes, max(line["peak_rss_bytes"] for line in lines)),
    ]
    loss = planned.expected("loss")
    if loss is not None and lines[-1].get("tokens", 0) >= planned.tokens:
        scores.append(Score("loss", loss, lines[-1].get("held_out_loss", lines[-1]["loss"])))
    return scores


def scores_text(scores: list[Score]) -> str:
    """For a person: predicted, measured, and by how much the prediction was off."""
    shown = {"step_seconds": lambda x: f"{x:.3g} s", "peak_rss_bytes": human, "loss": lambda x: f"{x:.3f}"}
    rows = [f"{s.what:<16} predicted {shown[s.what](s.predicted):>10}  measured {shown[s.what](s.measured):>10}  {s.error:+.0%}"
            for s in scores]  # fmt: skip
    return "\n".join(rows)


def _short(value: float) -> str:
    """Three digits of a small number, the whole of a large one."""
    return f"{value:.3g}" if value < 100 or not math.isfinite(value) else f"{value:,.0f}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
