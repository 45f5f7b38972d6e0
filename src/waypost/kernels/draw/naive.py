"""A token from each row of logits, in plain PyTorch: the inverse of a cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from waypost.kernels.draw import truncation

BLOCK = 256
"""Tokens whose probabilities are summed before the running sum looks at them one by one."""


def draw(logits: Tensor, rows: Sequence[int], edited: Sequence[Tensor | None], wishes: Tensor) -> tuple[Tensor, Tensor]:
    tokens, shares = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.float64)
    cuts = ((wishes[:, 1] > 0) | (wishes[:, 2] < 1) | (wishes[:, 3] > 0)).tolist()
    for cut in (False, True):  # rows that remove nothing do not pay for those that do
        part = [i for i, each in enumerate(cuts) if each == cut]
        if not part:
            continue
        own = [edited[i] for i in part]
        x = torch.stack([logits[rows[i]].float() if e is None else e.float() for i, e in zip(part, own, strict=True)])
        probs = distribution(x, wishes[part])
        tokens[part], shares[part] = inverse_cdf(probs, wishes[part, 4])
    return tokens, shares


def distribution(logits: Tensor, wishes: Tensor) -> Tensor:
    """(n, V) float32 logits, wishes (n, 5) of DrawOp -> (n, V) probabilities after temperature and truncation; those kept need
    not sum to one."""
    temperature, k, p, m, _ = wishes[:, :, None].unbind(1)  # (n, 1) each
    x = logits - logits.amax(-1, keepdim=True)  # a small temperature then overflows to minus infinity, never to NaN
    x = x / temperature.clamp(max=torch.finfo(torch.float32).max).float()
    if bool((k > 0).any()):
        x = truncation.top_k(x, torch.where(k > 0, k, x.shape[1]).clamp(max=x.shape[1]).long())
    probs = torch.softmax(x, dim=-1)
    if bool((p < 1).any()):
        probs = truncation.top_p(probs, p)
    if bool((m > 0).any()):
        probs = truncation.min_p(probs, m.float())
    return probs


def inverse_cdf(probs: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(n, V) non-negative weights, uniform (n,) float64 in [0, 1) -> (n,) the token at which the running sum, in the order
    of the vocabulary, first exceeds uniform times the total, and its share of it. Summed in float64, in blocks of BLOCK."""
    missing = -probs.shape[1] % BLOCK
    blocks = (F.pad(probs, (0, missing)) if missing else probs).unflatten(1, (-1, BLOCK))  # (n, V / BLOCK, BLOCK)
    mass = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform[:, None] * mass[:, -1:]
    block = _first_above(mass, target)
    before = torch.where(block > 0, mass.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(len(probs)), block[:, 0]].cumsum(-1, dtype=torch.float64)
    token = block * BLOCK + _first_above(inside, target - before)
    return token[:, 0], (probs.gather(1, token).double() / mass[:, -1:])[:, 0]


def _first_above(mass: Tensor, target: Tensor) -> Tensor:
    """Where the rising `mass` (n, m) first exceeds `target` (n, 1); where rounding has put the target at the total or
    above it, the last place that adds mass."""
    first = torch.searchsorted(mass, target, right=True)
    return torch.minimum(first, torch.searchsorted(mass, mass[:, -1:].contiguous()))
