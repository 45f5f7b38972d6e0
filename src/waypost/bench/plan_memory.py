"""Claim: `waypost plan` says beforehand how much memory a run will take.

Both sides of the comparison are predictions, against the most bytes that the run's process held at once. Ours is what `waypost
plan` prints; the baseline is the rule by which one sizes a machine with Adam: 16 bytes a parameter (Rajbhandari et al. 2020,
ZeRO, arXiv:1910.02054, sec. 3.1), which counts neither activations nor the process. Beside it stands the rule with the bytes of
the process that our plan found, so that what remains is tensors.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waypost.bench.receipt import Options, Receipt, series
from waypost.core.config import technique
from waypost.core.errors import NumericsError, WaypostError
from waypost.core.progress import progress

RULE_BYTES = 16
"""A parameter: weights and gradients in 16 bits, master and two moments in 32; in float32 throughout it is as many."""
VOCAB_SIZE = 8192
LONGEST = 2048
SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": LONGEST, "tie_word_embeddings": True,
}  # fmt: skip
"""29 million parameters."""
TINY: dict[str, Any] = {
    **SMALL, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
"""3 million."""


def _setting(
    model: Mapping[str, Any], precision: str, memory: str, optimizer: str, seq_len: int, micro_tokens: int = LONGEST
) -> dict[str, Any]:
    """What a setting's recipe has of its own."""
    given = {"name": memory, **({"chunk_tokens": 256} if memory == "stream_bp" else {})}
    return {
        "model": dict(model), "precision": precision, "memory": given, "optimizer": {"name": optimizer}, "seq_len": seq_len,
        "micro_tokens": micro_tokens,
    }  # fmt: skip


SETTINGS: Mapping[str, dict[str, Any]] = {
    "small_fp32_plain_adamw_512": _setting(SMALL, "fp32", "plain", "adamw", 512),
    "small_fp32_recompute_adamw_2048": _setting(SMALL, "fp32", "recompute", "adamw", 2048),
    "small_bf16_plain_adamw_512_two_micro": _setting(SMALL, "bf16", "plain", "adamw", 512, LONGEST // 2),
    "small_bf16_stream_bp_muon_2048": _setting(SMALL, "bf16", "stream_bp", "muon", 2048),
    "tiny_fp32_plain_muon_2048": _setting(TINY, "fp32", "plain", "muon", 2048),
    "tiny_bf16_recompute_adamw_2048": _setting(TINY, "bf16", "recompute", "adamw", 2048),
}


@technique
class PlanMemory:
    steps: int = 3
    worst: float = 0.15
    """What the claim promises: the median error over the settings, as a share of what was measured."""

    def measure(self, options: Options) -> Receipt:
        """Each setting is planned in one process and trained in another; tokenizer and shards are there before."""
        errors, rule = [], []
        extra: dict[str, float] = {}
        tensors, with_process = [], []
        with tempfile.TemporaryDirectory(prefix="waypost-plan-") as scratch, progress("plan.memory", len(SETTINGS) + 1) as bar:
            folder = Path(scratch)
            first = {**SETTINGS["tiny_bf16_recompute_adamw_2048"], "tokenizer": {"vocab_size": VOCAB_SIZE}}
            _trained(folder, "first", self._recipe(folder, first, 1, options.threads), 1)
            (tokenizer,) = (folder / "cache").glob("tokenizer-*")
            bar.advance(note="the tokenizer")
            for name, setting in SETTINGS.items():
                given = {**setting, "tokenizer": {"path": str(tokenizer)}}
                recipe = self._recipe(folder, given, self.steps, options.threads)
                planned = _planned(folder, name, recipe)
                measured = _trained(folder, name, recipe, self.steps)
                simple = RULE_BYTES * planned["parameters"]
                process = planned["process_bytes"]
                errors.append(planned["peak_rss_bytes"] / measured - 1)
                rule.append(abs(simple / measured - 1))
                with_process.append(abs((simple + process) / measured - 1))
                tensors.append(abs(planned["memory"]["peak"] / (measured - process) - 1))
                extra |= {f"{name}_predicted_mb": planned["peak_rss_bytes"] / 1e6, f"{name}_measured_mb": measured / 1e6}
                extra |= {f"{name}_rule_mb": simple / 1e6, f"{name}_process_mb": process / 1e6}
                bar.advance(note=f"{name}: {planned['peak_rss_bytes'] / 1e6:.0f} of {measured / 1e6:.0f} MB")
        of_tensors = statistics.median(tensors)
        return Receipt(
            claim="plan.memory",
            statement=f"error of the memory that waypost plan predicts for {len(SETTINGS)} settings (3 and 29 million "
            "parameters, two precisions, three memory techniques, two optimizers), against the most that a process of its own "
            f"held in {self.steps} steps of each; the rule of {RULE_BYTES} bytes a parameter beside it",
            numerics="exact",
            ours=series("waypost plan", "relative error", list(map(abs, errors))),
            baseline=series(f"{RULE_BYTES} bytes a parameter", "relative error", rule),
            higher_is_better=False,
            floor=None,
            limit=self.worst,
            agreement="plan and run read the same recipe file, tokenizer and shards; every run took its steps",
            command="waypost bench plan.memory",
            over="settings",
            caveat=f"{direction(errors)}; of tensors alone, without the process, the median error is {of_tensors:.3f}",
            extra={
                "error_worst": max(map(abs, errors)),
                "error_of_tensors_alone": of_tensors,
                "rule_and_process_error": statistics.median(with_process),
                **extra,
            },
        )

    def _recipe(self, folder: Path, given: Mapping[str, Any], steps: int, threads: int) -> dict[str, Any]:
        """The whole recipe. Nothing is held out, and only the end is saved: what is measured is a step."""
        own = {key: value for key, value in given.items() if key != "seq_len"}
        data = {
            "sources": [{"path": "builtin:austen"}], "seq_len": given["seq_len"], "held_out": {"frac": 0.0},
            "cache": str(folder / "cache"),
        }  # fmt: skip
        batch = {"name": "fixed", "tokens": LONGEST}
        return {**own, "data": data, "batch": batch, "steps": steps, "save": {"every_steps": 1000}, "threads": threads}


def direction(errors: Sequence[float]) -> str:
    """The worst of signed relative errors, and how many are too low."""
    worst, low = max(errors, key=abs), sum(error < 0 for error in errors)
    return f"the worst is {abs(worst):.3f} too {'low' if worst < 0 else 'high'}, and {low} of {len(errors)} are too low"


def _planned(folder: Path, name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `waypost plan --json` says."""
    found: dict[str, Any] = json.loads(_waypost("plan", _written(folder, name, recipe), "--json"))
    return found


def _trained(folder: Path, name: str, recipe: Mapping[str, Any], steps: int) -> float:
    """The most bytes of the process that trained by `recipe`, as its metrics have them."""
    from waypost.train.metrics import read_lines

    out = folder / f"run-{name}"
    _waypost("train", _written(folder, name, recipe), "--out", str(out))
    peaks = [line["peak_rss_bytes"] for line in read_lines(out / "metrics.jsonl") if "step_seconds" in line]
    if len(peaks) != steps:
        raise NumericsError(f"plan.memory: {name} took {len(peaks)} steps, not {steps}")
    return float(max(peaks))


def _written(folder: Path, name: str, recipe: Mapping[str, Any]) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def _waypost(*args: str) -> str:
    """The stdout of a command in a process of its own. A shell lies between: Linux counts what a process's parent held at
    the most as its own, and a shell holds nothing."""
    argv = [sys.executable, "-c", "from waypost.cli.main import main; main()", *args]
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *argv], capture_output=True, text=True)
    if done.returncode != 0:
        raise WaypostError(f"plan.memory: waypost {args[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
