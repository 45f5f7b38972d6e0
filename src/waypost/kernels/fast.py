"""`numerics: fast`: the fastest operators at hand, whose bits may depend on the batch. One switch away from the exact set.

On a CPU these are the compiled ones: PyTorch's products and attention in bfloat16 are no faster (`waypost bench exact.stream`).
Products of other types are PyTorch's on the rows as they are, which the exact set pads. Without a compiler, and on a GPU, all
operators are PyTorch's.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from waypost.kernels.attention.naive import counting, write_pages
from waypost.kernels.cross_entropy.naive import cross_entropy_gradient
from waypost.kernels.draw.naive import draw
from waypost.kernels.largest.naive import largest
from waypost.kernels.low_rank.naive import low_rank
from waypost.kernels.ops import Ops
from waypost.kernels.rms_norm.naive import rms_norm
from waypost.kernels.rope.naive import rope
from waypost.kernels.squared_norm.naive import squared_norm
from waypost.kernels.vocabulary import WHOLE


def compiled() -> Ops:
    """The compiled set, with PyTorch's products where it has none of its own. ConfigError without a compiler."""
    from waypost.kernels import cpu
    from waypost.kernels.linear.cpu import ROW_TYPES
    from waypost.kernels.linear.cpu import linear as own

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (own if weight.dtype == torch.bfloat16 and x.dtype in ROW_TYPES else linear)(x, weight, bias)

    return replace(cpu.ops(), name="fast", linear=product)


def ops() -> Ops:
    """PyTorch's fused kernels."""
    return Ops(
        "fast",
        linear,
        rms_norm,
        rope,
        swiglu,
        write_pages,
        paged_attention,
        counting_attention,
        ragged_attention,
        log_sum_exp,
        largest,
        draw,
        cross_entropy_gradient,
        squared_norm,
        WHOLE,
        low_rank,
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), bias)


def log_sum_exp(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits.float(), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, starts: Tensor, context: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    out = torch.empty_like(q)
    page_tokens = v_pages.shape[2]
    bounds = starts.tolist()
    for s, cached in enumerate(context.tolist()):
        begin, end = bounds[s], bounds[s + 1]
        length = cached + end - begin
        pages = table[s, : -(-length // page_tokens)].long()
        k = k_pages[pages].permute(0, 3, 1, 2).flatten(0, 1)[:length]  # (length, G, D)
        v = v_pages[pages].permute(0, 2, 1, 3).flatten(0, 1)[:length]
        out[begin:end] = _sdpa(q[begin:end], k, v, cached, scale, window)
    return out


counting_attention = counting(paged_attention)


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, window: int | None, context: Tensor | None = None
) -> Tensor:
    cached = [0] * (len(starts) - 1) if context is None else context.tolist()
    parts, after = [], 0  # the keys of the sequences so far
    for (begin, end), before in zip(itertools.pairwise(starts.tolist()), cached, strict=True):
        keys = slice(after, after + before + end - begin)
        parts.append(_sdpa(q[begin:end], k[keys], v[keys], before, scale, window))
        after = keys.stop
    return torch.cat(parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cached: int, scale: float, window: int | None) -> Tensor:
    causal = cached == 0 and window is None
    mask = None
    if not causal:  # SDPA's is_causal is aligned to the first key, which is wrong for a chunk with context
        position = torch.arange(cached, cached + q.shape[0])[:, None]
        keys = torch.arange(k.shape[0])[None]
        mask = keys <= position
        if window is not None:
            mask = mask & (keys > position - window)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
