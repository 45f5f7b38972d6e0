"""What the machine would allow: the rate at which weights and cache stream past its memory, or its matrix units are busy.

Source    Williams et al. 2009, Roofline: An Insightful Visual Performance Model, Communications of the ACM 52(4)
Equation  seconds >= max(FLOPs / peak FLOP/s, bytes / memory bytes/s)
Shapes    S streams with C cached tokens each, or a prompt of T tokens -> tokens/s
Differs   a decode step reads the weights once for all streams and each stream's keys and values; a prefill reads the weights
          once. Bytes are those that lie there: 12 bits of a weight for few rows (kernels/linear/compact.py), 8 of a head that
          gives the likeliest token alone (kernels/greedy), whose operations are counted as if it gave all logits. Both ceilings
          are the best that products and reads reach here (peaks.py); weights that stay in the caches are read for less.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from waypost.bench.peaks import Peaks
    from waypost.model.config import ModelConfig


@dataclass(frozen=True)
class Roofline:
    """The least seconds that a piece of work can take, as a rate."""

    rate: float
    """Tokens a second at the ceiling."""
    bound: str
    """"memory" or "arithmetic": which ceiling is the lower one."""
    flops: float
    """FLOPs of the work."""
    moved_bytes: float
    """Bytes that must be read from memory."""
    peak_flops: float
    """Measured FLOP/s of a product in bfloat16."""
    memory_bytes: float
    """Measured bytes/s of the memory."""


def roofline(tokens: int, flops: float, moved_bytes: float, at: Peaks) -> Roofline:
    """The ceiling of work that gives `tokens` tokens."""
    computing, moving = flops / at.flops, moved_bytes / at.read_bytes
    bound = "memory" if moving > computing else "arithmetic"
    rate = tokens / max(computing, moving)
    return Roofline(rate, bound, flops, moved_bytes, at.flops, at.read_bytes)


def prefill(model: str, tokens: int, at: Peaks) -> Roofline:
    """Of a prompt of `tokens` tokens, to the logits that follow it."""
    from waypost.measure.flops import prefill_flops

    return roofline(tokens, prefill_flops(config_of(model), tokens), weight_bytes(model), at)


def decode(model: str, streams: int, context_tokens: int, at: Peaks) -> Roofline:
    """Of a step of `streams` streams of `context_tokens` cached tokens each."""
    from waypost.measure.flops import decode_flops
    from waypost.model.mixer import Attention

    config = config_of(model)
    mixers = [layer.mixer for layer in config.layers]
    cached = sum(  # K and V in bfloat16
        4 * m.num_key_value_heads * m.head_dim * min(context_tokens, m.window or context_tokens)
        for m in mixers
        if isinstance(m, Attention)
    )
    moved = step_bytes(model, streams) + float(streams * cached)
    return roofline(streams, streams * decode_flops(config, context_tokens), moved, at)


def weight_bytes(model: str) -> float:
    """Bytes of the weights that a forward pass reads: all but an embedding table that is not the head too."""
    from waypost.keep.reader import Checkpoint

    found = Checkpoint(Path(model))
    left_out = () if found.tied else ("model.embed_tokens.weight",)
    return float(sum(found.tensor(name).nbytes for name in found.names if name not in left_out))


def step_bytes(model: str, rows: int) -> float:
    """Bytes of the weights that a step reads whose rows, so many, ask for the likeliest token: as they lie for it."""
    from waypost.keep.reader import Checkpoint
    from waypost.kernels.linear.compact import BYTES_PER_WEIGHT, FEW_ROWS, pays

    found, embedding = Checkpoint(Path(model)), "model.embed_tokens.weight"
    moved, few = 0.0, rows <= FEW_ROWS and pays()
    for name in found.names:
        if name == "lm_head.weight" and found.tied:
            continue
        tensor = found.tensor(name)
        plain = tensor.ndim == 2 and tensor.dtype.itemsize == 2 and "_scale" not in name
        if name == embedding:
            moved += (tensor.numel() if plain else tensor.nbytes) if found.tied else 0.0
        else:
            moved += BYTES_PER_WEIGHT * tensor.numel() if plain and few else tensor.nbytes
    return moved


def config_of(model: str) -> ModelConfig:
    """What the folder `model` says of itself, without its weights."""
    from waypost.keep.reader import Checkpoint
    from waypost.model.hf import config_from_hf

    return config_from_hf({k: v for k, v in Checkpoint(Path(model)).config.items() if k != "quantization_config"})
