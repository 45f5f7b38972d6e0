"""Operators for parameters that are split over the ranks of a tensor-parallel axis.

A parameter says by its placement what is to be done: a DTensor split by rows makes a column-parallel product (each rank
some outputs), one split by columns a row-parallel product (each rank a part of every sum, added up), a replicated DTensor
one that each rank uses for its own heads. A plain parameter is the same on every rank, and so is what is computed with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from waypost.core.errors import ConfigError
from waypost.kernels.ops import Ops
from waypost.train.parallel._collectives import enter, join, leave, summed


def need_whole_weights(model: nn.Module, name: str) -> None:
    """ConfigError where some weights are frozen: an adapter beside a split weight would have to be split with it."""
    if any(not parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"parallel.{name}: adapters are trained beside whole weights; choose parallel: {{name: fsdp}}")


def split_ops(ops: Ops, group: Any) -> Ops:
    """`ops` for a model whose parameters are split over `group`."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not isinstance(weight, DTensor):
            return ops.linear(x, weight, bias)
        if weight.placements[-1] == Shard(0):
            return ops.linear(enter(x, group), weight.to_local(), here(bias))
        total = leave(ops.linear(x, weight.to_local()), group)
        return total if bias is None else total + bias

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not isinstance(weight, DTensor):
            return ops.rms_norm(x, weight, eps)
        # of heads: each rank's gradient is of its own heads alone; a few numbers, summed in float32
        wide = weight.to_local().to(torch.promote_types(weight.dtype, torch.float32))
        return ops.rms_norm(x, enter(wide, group).to(weight.dtype), eps)

    size, rank = dist.get_world_size(group), dist.get_rank(group)
    vocabulary = SplitVocabulary(group, rank, size)
    return replace(
        ops,
        name=f"{ops.name}+tensor{size}",
        linear=linear,
        rms_norm=rms_norm,
        vocabulary=vocabulary,
        at_once=None,
    )


def here(parameter: Tensor | None) -> Tensor | None:
    """This rank's part of a parameter. Differentiable."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@dataclass(frozen=True)
class SplitVocabulary:
    """V / size rows of the vocabulary are on each rank; see kernels.vocabulary.Vocabulary."""

    group: Any
    rank: int
    size: int

    def held(self, weight: Tensor) -> Tensor:
        part = here(weight)
        assert part is not None, "a weight was given"
        return part

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        part = self.held(weight)
        local, mine = self._local(tokens, part.shape[0])
        return leave(F.embedding(local, part).masked_fill(~mine[:, None], 0.0), self.group)

    def logits(self, h: Tensor, held: Tensor, ops: Ops) -> Tensor:
        return join(ops.linear(enter(h, self.group), held), self.group)

    def log_probs(self, logits: Tensor, targets: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        part = ops.log_sum_exp(logits)
        top = summed(part, self.group, dist.ReduceOp.MAX)
        local, mine = self._local(targets, logits.shape[1])
        target = logits.gather(1, local[:, None])[:, 0].to(part.dtype).masked_fill(~mine, 0.0)
        sums = summed(torch.stack([torch.exp(part - top), target]), self.group)
        lse = top + torch.log(sums[0])
        return sums[1] - lse, lse

    def gradient(
        self, logits: Tensor, lse: Tensor, targets: Tensor, weights: Tensor, held: Tensor, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        local, mine = self._local(targets, logits.shape[1])
        p = torch.exp(logits.to(lse.dtype) - lse[:, None])
        p[torch.arange(len(local)), local] -= mine.to(p.dtype)
        grad_logits = (p * weights[:, None]).to(logits.dtype)
        return grad_logits, summed(grad_logits @ held, self.group)

    def _local(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """(the row of each token on this rank, 0 where it is elsewhere; whether it is here)."""
        local = tokens - self.rank * rows
        mine = (local >= 0) & (local < rows)
        return local.where(mine, torch.zeros_like(local)), mine
