"""A step's sequences weighed by their losses: a forward pass without gradient before the step's own, and one exchange.

Invariants
- The losses of all ranks and micro-batches are known before any factor is.
- A sequence's loss has the same bits in any micro-batch on any rank (exact numerics), so its factor has too.
- The factors change no sum of loss weights, so the step's divisor stays what it was, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.model.decoder import Decoder
from waypost.train.objectives import Objective
from waypost.train.parallel import Share, World
from waypost.train.reweighting import Reweighting

UNWEIGHTED = "unweighted_loss"
"""What a step's loss would be without factors, nats: the loss of its text."""


class Reweigher:
    """Called by every rank in each step; does nothing where there is no reweighting, or none yet."""

    def __init__(
        self, model: Decoder, objective: Objective, reweighting: Reweighting | None, world: World, share: Share
    ) -> None:
        self.model, self.objective, self.reweighting = model, objective, reweighting
        self.world, self.share = world, share

    def __call__(self, batches: list[Batch], tokens: int) -> tuple[list[Batch], dict[str, float]]:
        """(this rank's micro-batches, their weights multiplied; what to report) of a step after `tokens` tokens."""
        if self.reweighting is None or not self.reweighting.active(tokens):
            return batches, {}
        mine = [sequence_losses(self.model, self.objective, batch) for batch in batches]
        losses, weights, places = self._gathered(mine)
        if not bool(losses.isfinite().all()) or not len(losses):
            return batches, {}  # the step itself finds it, and names the documents
        factors = self.reweighting.factors(losses, weights)
        found = [multiplied(batch, factors[at], sums) for batch, at, (_, sums) in zip(batches, places, mine, strict=True)]
        total = weights.sum()
        return found, {
            UNWEIGHTED: float((losses * weights).sum() / total),
            "effective_tokens_frac": float(total / (factors.square() * weights).sum()),
        }

    def _gathered(self, mine: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Mean losses and weights of all sequences that have a weight, in the order of the step's rows, (S,) float64 each;
        and where those of this rank's micro-batches stand there."""
        tables = [(losses[weights > 0].tolist(), weights[weights > 0].tolist()) for losses, weights in mine]
        everyone = self.world.gather((self.share.index, tables))
        of_share = dict(reversed(everyone))  # ranks of one share computed the same rows
        losses: list[float] = []
        weights: list[float] = []
        places = []
        for micro in range(len(mine)):
            for index in sorted(of_share):
                first, (more, sums) = len(losses), of_share[index][micro]
                losses += more
                weights += sums
                if index == self.share.index:
                    places.append(torch.arange(first, len(losses)))
        return torch.tensor(losses, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64), places


def sequence_losses(model: Decoder, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
    """(weighted mean loss, sum of weights) of each sequence, (S,) float64; the mean of a sequence without weight is 0."""
    assert batch.weights is not None, "a prepared batch has weights"
    weights = batch.weights.double()
    values = torch.where(weights > 0, objective.losses(model, batch).double(), 0.0) * weights
    owner = torch.repeat_interleave(torch.arange(batch.num_sequences), batch.starts.diff().long())
    sums = torch.zeros(2, batch.num_sequences, dtype=torch.float64)
    sums.index_add_(1, owner, torch.stack([values, weights]))
    return torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=1e-300), 0.0), sums[1]


def multiplied(batch: Batch, factors: Tensor, sums: Tensor) -> Batch:
    """`batch` with the weights of each sequence that has any (`sums` (S,) > 0) times its factor."""
    assert batch.weights is not None, "a prepared batch has weights"
    each = torch.ones_like(sums)
    each[sums > 0] = factors
    rows = torch.repeat_interleave(each.to(batch.weights.dtype), batch.starts.diff().long())
    return replace(batch, weights=batch.weights * rows)
