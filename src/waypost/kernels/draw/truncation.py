"""Removing unlikely tokens before the draw: top-k, top-p (nucleus), min-p.

Source    top-k: Fan et al. 2018, arXiv:1805.04833, sec. 5; top-p: Holtzman et al. 2020, arXiv:1904.09751, sec. 3.1;
          min-p: Nguyen et al. 2024, arXiv:2407.01082, sec. 3
Equation  top-k: x_j >= x_(k);  top-p: p_j >= p_(m), m the first with sum_{i <= m} p_(i) >= P;  min-p: p_j >= m max p
Shapes    (n, V) with one parameter a row, (n, 1) -> (n, V)
Acts on   each row alone: a row's bits do not depend on the rows beside it
Differs   tokens equal to the last one kept are kept too, where a sort would choose among them by its own order; bf16
          logits have many equals, and a kept set that depends on values alone is the same in every batch
Exact     k = V, P = 1, m = 0 remove nothing
"""

from __future__ import annotations

import torch
from torch import Tensor

PREFIXES = (128, 2048)
"""Lengths of the sorted heads in which the end of a nucleus is looked for before the whole row is sorted."""


def top_k(logits: Tensor, k: Tensor) -> Tensor:
    """(n, V) logits, k (n, 1) int64 in 1..V -> logits with -inf below the row's k-th largest."""
    largest = logits.topk(int(k.max()), dim=-1).values
    return logits.masked_fill(logits < largest.gather(1, k - 1), -torch.inf)


def top_p(probs: Tensor, p: Tensor) -> Tensor:
    """(n, V) probabilities, p (n, 1) float64 in (0, 1] -> probabilities with 0 outside each row's nucleus."""
    least = torch.zeros(probs.shape[0], 1, dtype=probs.dtype)
    open_rows = torch.nonzero(p[:, 0] < 1.0)[:, 0]
    for length in (*(n for n in PREFIXES if n < probs.shape[1]), probs.shape[1]):
        head = probs[open_rows].topk(length, dim=-1).values
        mass = head.cumsum(-1, dtype=torch.float64)  # one order, so that a longer head repeats the shorter one's sums
        reached = mass >= p[open_rows]
        found = reached[:, -1] if length < probs.shape[1] else torch.ones_like(reached[:, -1])
        last = (~reached).sum(-1, keepdim=True).clamp(max=length - 1)
        least[open_rows[found]] = head.gather(1, last)[found]
        open_rows = open_rows[~found]
        if not len(open_rows):
            break
    return probs.masked_fill(probs < least, 0.0)


def min_p(probs: Tensor, share: Tensor) -> Tensor:
    """(n, V) probabilities, share (n, 1) in [0, 1] -> probabilities with 0 below share times the row's largest."""
    return probs.masked_fill(probs < share * probs.amax(-1, keepdim=True), 0.0)
