"""What `waypost serve` says while it starts: where the time went, what there is room for, how to send a request."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from waypost.core.errors import counted
from waypost.core.progress import say

if TYPE_CHECKING:
    from waypost.serve.engine import Engine


class Story:
    """What happened since the start and how long it took, one line a phase on stderr."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def tell(self, phase: str, text: str, seconds: float | None = None) -> None:
        """`seconds` None: since the last line."""
        now = time.monotonic()
        say(f"  {phase:<7} {now - self._last if seconds is None else seconds:5.2f} s  {text}")
        self._last = now


def tell_loaded(story: Story, engine: Engine) -> None:
    """What was loaded, what was proved, and what there is room for."""
    import torch

    from waypost.kernels.ops import PAGE_TOKENS

    model, config = engine.model, engine.model.config
    dtype = str(engine.dtype).removeprefix("torch.")
    story.tell("load", f"{config.model_type}, {counted(len(config.layers), 'layer')}, {dtype}", engine.startup_s["load"])
    threads = counted(torch.get_num_threads(), "thread")
    if model.ops.name == "fast":
        proved = f"numerics fast: the quickest kernels, no bits promised, {threads}"
    else:
        proved = f"numerics exact, proved here: {model.ops.name} kernels, {threads}"
    story.tell("check", proved, engine.startup_s["check"])
    tokens = engine.pool.total * PAGE_TOKENS
    story.tell("ready", f"context {engine.max_seq_len:,} tokens, cache for {tokens:,}", story.seconds)


def invitation(url: str, model_name: str, chat: bool, keyed: bool, most_tokens: int | None = None) -> str:
    """How to send the first request, to a server that gives `most_tokens` to an answer (None: as many as there is room for)."""
    route = "chat/completions" if chat else "completions"
    asks = {"messages": [{"role": "user", "content": "What is a waypost?"}]} if chat else {"prompt": "A waypost is"}
    body = json.dumps({"model": model_name, **asks, "max_tokens": min(64, most_tokens or 64)})
    key = " -H 'Authorization: Bearer YOUR_KEY'" if keyed else ""
    return f"""
{model_name} is served at {url}/v1 (Ctrl-C stops). Try it:

  curl {url}/v1/{route} -H 'Content-Type: application/json'{key} \\
    -d '{body}'
"""
