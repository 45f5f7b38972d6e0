"""What the machine would allow: the rate at which weights and cache stream past its memory, or its matrix units are busy.

Source    Williams et al. 2009, Roofline: An Insightful Visual Performance Model, Communications of the ACM 52(4)
Equation  seconds >= max(FLOPs / peak FLOP/s, bytes / memory bytes/s)
Shapes    S streams with C cached tokens each, or a prompt of T tokens -> tokens/s
Differs   a decode step reads the weights once for all streams and each stream's keys and values; a prefill reads the weights
          once. Both ceilings are the best that a plain product in bfloat16 and a plain copy reach here, so a kernel that beats
          these can pass them, weights that stay in the caches are read for less, and so are those of few rows, which lie in
          12 bits (kernels/linear/compact.py); a head that gives the likeliest token alone does less than is counted
          (kernels/greedy).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from waypost.measure.machine import Machine
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


def roofline(tokens: int, flops: float, moved_bytes: float, machine: Machine) -> Roofline:
    """The ceiling of work that gives `tokens` tokens."""
    computing, moving = flops / machine.flops_bfloat16, moved_bytes / machine.memory_bytes
    bound = "memory" if moving > computing else "arithmetic"
    rate = tokens / max(computing, moving)
    return Roofline(rate, bound, flops, moved_bytes, machine.flops_bfloat16, machine.memory_bytes)


def prefill(model: str, tokens: int, machine: Machine) -> Roofline:
    """Of a prompt of `tokens` tokens, to the logits that follow it."""
    from waypost.measure.flops import prefill_flops

    return roofline(tokens, prefill_flops(config_of(model), tokens), weight_bytes(model), machine)


def decode(model: str, streams: int, context_tokens: int, machine: Machine) -> Roofline:
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
    moved = weight_bytes(model) + float(streams * cached)
    return roofline(streams, streams * decode_flops(config, context_tokens), moved, machine)


def weight_bytes(model: str) -> float:
    """Bytes of the weights that a forward pass reads: all but an embedding table that is not the head too."""
    from waypost.keep.reader import Checkpoint

    found = Checkpoint(Path(model))
    left_out = () if found.tied else ("model.embed_tokens.weight",)
    return float(sum(found.tensor(name).nbytes for name in found.names if name not in left_out))


def config_of(model: str) -> ModelConfig:
    """What the folder `model` says of itself, without its weights."""
    from waypost.keep.reader import Checkpoint
    from waypost.model.hf import config_from_hf

    return config_from_hf({k: v for k, v in Checkpoint(Path(model)).config.items() if k != "quantization_config"})
