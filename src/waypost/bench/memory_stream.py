"""Claims: StreamBP and SeCO hold fewer bytes of tensors than recomputation does, with plain's gradient; what they cost in time.

StreamBP's authors claim sequences 2.8 to 5.5 times as long as with recomputation, at the same or a shorter time; SeCO's that
one card trains 16 times as long ones as plain does. Bytes are counted (measure/live.py), once, so the ratio is the same on
every machine, and its range is that over the lengths; seconds stand in the extra numbers, with the spread of their rounds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

from waypost.bench.receipt import Options, Receipt, Series, series
from waypost.core.config import technique
from waypost.core.errors import NumericsError
from waypost.core.progress import progress

if TYPE_CHECKING:
    from waypost.core.batch import Batch
    from waypost.model.decoder import Decoder
    from waypost.train.memory import Memory

MODEL: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LENGTHS = [512, 1024, 2048, 4096, 8192]


@technique
class MemoryStream:
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    chunk_tokens: int = 128
    budget_mb: int = 64

    def measure(self, options: Options) -> Receipt:
        """One document of growing length, a forward and a backward pass of each technique in turn, in float32."""
        return _compare("stream_bp", "StreamBP", ("selective", "recompute"), MODEL, self, options)


@technique
class MemorySeco:
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    chunk_tokens: int = 128
    budget_mb: int = 64
    num_key_value_heads: int = 1
    """Of four heads: what SeCO keeps of a token is its keys, its values and their gradients."""

    def measure(self, options: Options) -> Receipt:
        """As memory.stream, with SeCO against recomputation, and StreamBP beside it; both again with more heads."""
        config = {**MODEL, "num_key_value_heads": self.num_key_value_heads}
        receipt = _compare("seco", "SeCO", ("recompute", "stream_bp"), config, self, options)
        more, length = MODEL["num_key_value_heads"], sorted(self.lengths)[-2]
        held = {name: _held(memory, MODEL, length)[0] / 1e6 for name, memory in _sides(("stream_bp", "seco"), self).items()}
        caveat = (
            f"with {more} of {MODEL['num_attention_heads']} heads for keys and values it holds {held['seco']:.1f} MB at "
            f"{length} tokens, StreamBP {held['stream_bp']:.1f} MB"
        )
        extra = {f"{name}_{length}_{more}_heads_mb": value for name, value in held.items()}
        return replace(receipt, caveat=caveat, extra={**receipt.extra, **extra})


def _compare(
    ours: str,
    called: str,
    others: tuple[str, ...],
    config: Mapping[str, Any],
    claim: MemoryStream | MemorySeco,
    options: Options,
) -> Receipt:
    """`ours` against recomputation, with plain and `others` beside it."""
    import torch

    torch.set_num_threads(options.threads)
    sides = _sides(("plain", *others, ours), claim)
    peaks: dict[str, list[float]] = {name: [] for name in sides}
    extra: dict[str, float] = {}
    worst, name = 0.0, "memory.stream" if ours == "stream_bp" else f"memory.{ours}"
    with progress(name, len(claim.lengths), "lengths") as bar:
        for length in claim.lengths:
            found = {side: _held(memory, config, length) for side, memory in sides.items()}  # and each has run once
            gradient = found["plain"][1]
            for side, (peak, mine) in found.items():
                peaks[side].append(peak / 1e6)
                extra[f"{side}_{length}_mb"] = peak / 1e6
                worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, gradient, strict=True)))
            for side, taken in _timed(sides, config, length, options.repeats).items():
                extra |= {f"{side}_{length}_s": taken.median, f"{side}_{length}_s_spread": taken.spread}
            bar.advance(note=", ".join(f"{side} {peaks[side][-1]:.0f} MB" for side in sides))
    if worst > 2e-5:  # sums of 64 chunks
        raise NumericsError(f"{name}: gradients differ from plain's by {worst:.1e} of their largest entry")
    for side, values in peaks.items():
        slope = (values[-1] - values[0]) / (claim.lengths[-1] - claim.lengths[0])  # the tail is a straight line
        extra[f"{side}_longest_in_{claim.budget_mb}_mb"] = int(claim.lengths[0] + (claim.budget_mb - values[0]) / slope)
    return Receipt(
        claim=name,
        statement=f"most bytes of tensors in a forward and backward pass over one document of {claim.lengths[0]} to "
        f"{claim.lengths[-1]} tokens, {config['num_hidden_layers']} layers of {config['hidden_size']} channels in float32, "
        f"{config['num_key_value_heads']} of {config['num_attention_heads']} heads for keys and values: chunks of "
        f"{claim.chunk_tokens} tokens ({called}) against recomputation of layers",
        numerics="exact",
        ours=series(ours, "MB", peaks[ours]),
        baseline=series("recompute", "MB", peaks["recompute"]),
        higher_is_better=False,
        floor=1.0,
        agreement=f"gradients are plain's to {worst:.0e} of their largest entry",
        command=f"waypost bench {name}",
        over="lengths",
        extra=extra,
    )


def _sides(names: Sequence[str], claim: MemoryStream | MemorySeco) -> dict[str, Memory]:
    from waypost.core.config import build
    from waypost.train.memory import MEMORIES

    chunks = {"chunk_tokens": claim.chunk_tokens}
    return {name: build(MEMORIES[name], chunks if name in ("stream_bp", "seco") else {}) for name in names}


def _held(memory: Memory, config: Mapping[str, Any], length: int) -> tuple[int, list[Any]]:
    """(the most bytes of tensors in the two passes, gradients) of a fresh model."""
    from waypost.measure.live import LiveBytes
    from waypost.train.objectives import Causal

    model, batch = _work(config, length)
    with LiveBytes(model.parameters()) as live:
        memory.forward_backward(model, batch, Causal(), float(length))
    return live.peak, [p.grad for p in model.parameters()]


def _timed(sides: Mapping[str, Memory], config: Mapping[str, Any], length: int, repeats: int) -> dict[str, Series]:
    """Seconds of the two passes of each side, in turn; every other round in the other order."""
    from waypost.train.objectives import Causal

    model, batch = _work(config, length)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            model.zero_grad(set_to_none=True)
            began = time.perf_counter()
            sides[name].forward_backward(model, batch, Causal(), float(length))
            found[name].append(time.perf_counter() - began)
    return {name: series(name, "s", seconds) for name, seconds in found.items()}


def _work(config: Mapping[str, Any], length: int) -> tuple[Decoder, Batch]:
    """A fresh model and one document."""
    import torch

    from waypost.core.batch import Batch
    from waypost.model import hf
    from waypost.model.decoder import Decoder

    model = Decoder(hf.config_from_hf(config)).initialise(0)
    ids = torch.randint(0, config["vocab_size"], (length + 1,), generator=torch.Generator().manual_seed(length))
    return model, Batch.of([ids[:-1]], targets=[ids[1:]], weights=[torch.ones(length)])
