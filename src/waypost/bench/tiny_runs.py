"""Training runs of a tiny model on the shipped text, for claims about quality: what is learned from, chosen by and reported on
are three disjoint sets of chapters.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from waypost.data.text import BREAK, builtin_documents

if TYPE_CHECKING:
    from waypost.model.decoder import Decoder

STEP_TOKENS = 1024
SEQ_LEN = 128

DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": SEQ_LEN, "tie_word_embeddings": True,
}  # fmt: skip
"""0.3 million parameters."""


def mixture(num_experts: int, num_experts_per_tok: int = 2) -> dict[str, Any]:
    """As `DENSE`, every feed-forward a mixture of experts as wide as the dense one."""
    return {
        **DENSE,
        "model_type": "mixtral",
        "num_local_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
    }


@dataclass(frozen=True)
class Texts:
    """Files made of the chapters of a shipped text: of every 24 chapters two are for choosing by, three for reporting on."""

    train: Path
    search: Path
    report: Path

    @staticmethod
    def write(folder: Path, name: str = "kjv") -> Texts:
        """The three files, in `folder`."""
        chapters = list(builtin_documents(name))
        parts = {"search": (0, 12), "report": (4, 9, 17)}
        chosen = {what: [c for i, c in enumerate(chapters) if i % 24 in places] for what, places in parts.items()}
        held = {places for group in parts.values() for places in group}
        chosen["train"] = [c for i, c in enumerate(chapters) if i % 24 not in held]
        paths = {}
        for what, documents in chosen.items():
            paths[what] = folder / f"{what}.txt"
            paths[what].write_text((BREAK if what == "train" else "\n").join(documents), encoding="ascii")
        return Texts(paths["train"], paths["search"], paths["report"])


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    folder: Path
    checkpoint: Path
    seconds: float
    """Of its steps."""
    loads: tuple[float, float]
    """Of the fullest and of the emptiest expert, mean of the last eighth of the steps; 1 is even, and without experts."""


class Lab:
    """Where the runs of one seed stand; they share the texts, the tokenizer and the tokenised shards."""

    def __init__(self, folder: Path, texts: Texts, seed: int, threads: int) -> None:
        self.folder, self.texts, self.seed, self.threads = folder, texts, seed, threads

    def train(
        self,
        name: str,
        start: Mapping[str, Any],
        steps: int,
        *,
        before: int = 0,
        decay_frac: float = 0.0,
        lr: float = 4e-3,
        save: Mapping[str, Any] | None = None,
    ) -> Run:
        """`start` is {"model": sizes} or {"init": ...}; `steps` follow on the `before` steps of the branch it goes on from.

        The rate is constant after a warm-up of 16 steps, and falls to zero over the last `decay_frac` of `steps`.
        """
        from waypost.train.run import train

        end, decay = (before + steps) * STEP_TOKENS, round(decay_frac * steps) * STEP_TOKENS
        shape = {"decay_start_tokens": end - decay, "decay_tokens": decay} if decay else {"decay_start_tokens": None}
        source = {"path": str(self.texts.train), "separator": BREAK}
        usual = {"balancing": {"name": "global_batch", "coef": 0.01}}
        experts = usual if "balancing" not in start and self._has_experts(start) else {}
        # A fresh start after a trunk must not read the trunk's rows again.
        seed = self.seed if "model" in start or start["init"].get("optimizer") else 1000 + self.seed
        out = self.folder / name
        result = train(
            {
                **start,
                **({"tokenizer": {"vocab_size": 1024}} if "model" in start else {}),
                "data": {
                    "sources": [source], "seq_len": SEQ_LEN, "held_out": {"frac": 0.0},
                    "cache": str(self.folder.parent / "shards"),
                },
                **experts,
                "optimizer": {"name": "adamw", "lr": lr},
                "schedule": {"name": "wsd", "warmup_tokens": 16 * STEP_TOKENS, **shape},
                "batch": {"name": "fixed", "tokens": STEP_TOKENS},
                "tokens": end,
                "save": dict(save or {"every_steps": before + steps, "keep_last": 1}),
                "seed": seed,
                "threads": self.threads,
            },
            out,
        )  # fmt: skip
        return Run(out, result.checkpoint, result.seconds, _loads(out / "metrics.jsonl", steps))

    def _has_experts(self, start: Mapping[str, Any]) -> bool:
        from waypost.keep.reader import Checkpoint

        config = start["model"] if "model" in start else Checkpoint(start["init"]["checkpoint"]).config
        return bool(config.get("num_local_experts"))

    def loss(self, checkpoint: Path) -> float:
        """Nats a token on the text to report on."""
        from waypost.model.hf import load

        return self.loss_of(load(checkpoint), checkpoint)

    def loss_of(self, model: Decoder, checkpoint: Path, text: Path | None = None) -> float:
        """As `loss`, of a model that reads with the tokenizer of `checkpoint`; of `text` instead, if that is given."""
        from waypost.core.config import build
        from waypost.keep.reader import Checkpoint
        from waypost.measure.perplexity import evaluate
        from waypost.transform.recipe import HeldOut
        from waypost.transform.run import held_out_batches

        held = build(HeldOut, {"path": str(text or self.texts.report), "max_tokens": 24576, "seq_tokens": SEQ_LEN})
        return evaluate(model, held_out_batches(Checkpoint(checkpoint), held)).loss


def _loads(metrics: Path, steps: int) -> tuple[float, float]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][-max(1, steps // 8) :]
    sides = ([line.get(key, 1.0) for line in lines] for key in ("expert_load_max", "expert_load_min"))
    most, least = (sum(values) / len(values) for values in sides)
    return most, least


def step_ms(run: Path) -> float:
    """The median of the run's last half of steps, in milliseconds."""
    from waypost.train.metrics import read_lines

    lines: list[dict[str, Any]] = read_lines(run / "metrics.jsonl")
    return 1e3 * statistics.median(line["step_seconds"] for line in lines[len(lines) // 2 :])
