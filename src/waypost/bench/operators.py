"""Our operators against the best of PyTorch's for the same work, one by one and in turn, in the shapes of a pass in bfloat16.

PyTorch's product is taken as `F.linear` does it and with the weights reordered beforehand, as its compiler freezes them,
whichever is faster; its attention gets keys and values that lie together, where ours walks pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from waypost.core.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from torch import Tensor

    from waypost.model.config import ModelConfig
    from waypost.model.ffn import Dense
    from waypost.model.mixer import Attention

CALLS = 20
"""Calls of each side in a round."""
TOLERANCE = 0.02
"""Of the largest output: how far bfloat16 in another order may be off."""


@dataclass(frozen=True)
class Pair:
    """One operator: ours, and what PyTorch has for it."""

    name: str
    ours: Callable[[], Tensor]
    theirs: Sequence[Callable[[], Tensor]]


def ratios(config: ModelConfig, rows: int, sequences: int, context: int, rounds: int) -> dict[str, float]:
    """Operator -> how many times as fast ours is as PyTorch's, the median over `rounds`, for a pass of `rows` rows in so many
    sequences with `context` cached tokens each. NumericsError where the outputs do not agree."""
    import torch

    found: dict[str, float] = {}
    with torch.inference_mode():
        for pair in [*_products(config, rows, sequences), _attention(config, rows, sequences, context)]:
            want = pair.ours().float()
            for other in pair.theirs:
                off = float((other().float() - want).abs().max() / want.abs().max())
                if not off <= TOLERANCE:
                    raise NumericsError(f"{pair.name}: PyTorch's outputs are off by {off:.3f} of the largest")
            turns = [[_seconds(f) for f in (pair.ours, *pair.theirs)] for _ in range(rounds + 1)][1:]
            found[pair.name] = median(min(theirs) / ours for ours, *theirs in turns)
    return found


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def _products(config: ModelConfig, rows: int, sequences: int) -> list[Pair]:
    """Of the first layer, which projections of one input share, and of the head, which sees one row a sequence."""
    mixer, ffn = _first(config)
    width = config.hidden_size
    queries, pairs = mixer.num_attention_heads * mixer.head_dim, mixer.num_key_value_heads * mixer.head_dim
    shapes = {
        "qkv": (width, queries + 2 * pairs, rows),
        "out": (queries, width, rows),
        "gate_up": (width, 2 * ffn.intermediate_size, rows),
        "down": (ffn.intermediate_size, width, rows),
        "head": (width, config.vocab_size, sequences),
    }
    return [_product(name, *shape) for name, shape in shapes.items()]


def _first(config: ModelConfig) -> tuple[Attention, Dense]:
    from waypost.model.ffn import Dense
    from waypost.model.mixer import Attention

    layer = config.layers[0]
    if not isinstance(layer.mixer, Attention) or not isinstance(layer.ffn, Dense):
        raise ConfigError("operators are compared for a dense model with attention")
    return layer.mixer, layer.ffn


def _product(name: str, inputs: int, outputs: int, rows: int) -> Pair:
    import torch
    import torch.nn.functional as F

    from waypost.kernels.linear.cpu import pack

    x, weight = _noise(rows, inputs), _noise(outputs, inputs)
    packed = pack(weight)
    theirs: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight)]
    if torch.backends.mkldnn.is_available():
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        theirs.append(lambda: torch.ops.mkldnn._linear_pointwise(x, reordered, None, "none", [], ""))
    return Pair(name, lambda: packed(x), theirs)


def _attention(config: ModelConfig, rows: int, sequences: int, context: int) -> Pair:
    import torch
    import torch.nn.functional as F

    from waypost.kernels import cpu
    from waypost.kernels.ops import PAGE_TOKENS

    ops, (mixer, _) = cpu.ops(), _first(config)
    heads, groups, width = mixer.num_attention_heads, mixer.num_key_value_heads, mixer.head_dim
    new = rows // sequences
    if context and new > 1:
        raise ConfigError("operators are compared in a prefill without a cache, or with one new row a sequence")
    keys, pages = context + new, -(-(context + new) // PAGE_TOKENS)
    q, k, v = _noise(rows, heads, width), _noise(sequences, keys, groups, width), _noise(sequences, keys, groups, width)
    table = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    slots = (table.long()[:, :, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten(1)[:, :keys].flatten()
    k_pages = torch.zeros(sequences * pages, groups, width, PAGE_TOKENS, dtype=torch.bfloat16)
    v_pages = torch.zeros(sequences * pages, groups, PAGE_TOKENS, width, dtype=torch.bfloat16)
    ops.write_pages(k.flatten(0, 1), v.flatten(0, 1), k_pages, v_pages, slots)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * new
    cached = torch.full((sequences,), context, dtype=torch.int32)
    scale = width**-0.5
    queries, all_k, all_v = (x.view(sequences, -1, x.shape[-2], width).transpose(1, 2).contiguous() for x in (q, k, v))

    def ours() -> Tensor:
        return ops.paged_attention(q, k_pages, v_pages, table, starts, cached, scale, None)

    def theirs() -> Tensor:
        out = F.scaled_dot_product_attention(queries, all_k, all_v, is_causal=new > 1, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).reshape(rows, heads, width)

    return Pair("attention", ours, [theirs])


def _noise(*shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()
