"""What the claims about `waypost plan` share: models and settings to plan, and plans and runs in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from waypost.core.errors import NumericsError, WaypostError

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


def setting(
    model: Mapping[str, Any], precision: str, memory: str, optimizer: str, seq_len: int, micro_tokens: int = LONGEST
) -> dict[str, Any]:
    """What a setting's recipe has of its own."""
    given = {"name": memory, **({"chunk_tokens": 256} if memory in ("stream_bp", "seco") else {})}
    return {
        "model": dict(model), "precision": precision, "memory": given, "optimizer": {"name": optimizer}, "seq_len": seq_len,
        "micro_tokens": micro_tokens,
    }  # fmt: skip


def prepared(folder: Path, threads: int) -> str:
    """Trains a tokenizer in `folder` and tokenises the text, so that no run that counts does it: the tokenizer's folder."""
    first = {**setting(TINY, "bf16", "recompute", "adamw", LONGEST), "tokenizer": {"vocab_size": VOCAB_SIZE}}
    trained(folder, "first", recipe_of(folder, first, 1, threads), 1)
    (tokenizer,) = (folder / "cache").glob("tokenizer-*")
    return str(tokenizer)


def recipe_of(folder: Path, given: Mapping[str, Any], steps: int, threads: int) -> dict[str, Any]:
    """The whole recipe of a setting. Nothing is held out, and only the end is saved: what is measured is a step."""
    own = {key: value for key, value in given.items() if key != "seq_len"}
    data = {
        "sources": [{"path": "builtin:austen"}], "seq_len": given["seq_len"], "held_out": {"frac": 0.0},
        "cache": str(folder / "cache"),
    }  # fmt: skip
    batch = {"name": "fixed", "tokens": LONGEST}
    return {**own, "data": data, "batch": batch, "steps": steps, "save": {"every_steps": 1000}, "threads": threads}


def planned(folder: Path, name: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What `waypost plan --json` says."""
    found: dict[str, Any] = json.loads(_waypost("plan", _written(folder, name, recipe), "--json"))
    return found


def trained(folder: Path, name: str, recipe: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """The lines of metrics, one a step, of a process that trained by `recipe`."""
    from waypost.train.metrics import read_lines

    out = folder / f"run-{name}"
    _waypost("train", _written(folder, name, recipe), "--out", str(out))
    lines = [line for line in read_lines(out / "metrics.jsonl") if "step_seconds" in line]
    if len(lines) != steps:
        raise NumericsError(f"waypost train: {name} took {len(lines)} steps, not {steps}")
    return lines


def direction(errors: Sequence[float]) -> str:
    """The worst of signed relative errors, and how many are too low."""
    worst, low = max(errors, key=abs), sum(error < 0 for error in errors)
    return f"the worst is {abs(worst):.3f} too {'low' if worst < 0 else 'high'}, and {low} of {len(errors)} are too low"


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
        raise WaypostError(f"waypost plan: waypost {args[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
