"""Seconds of a step, from trying a little of it: a micro-batch through one layer and through two, and the head.

The rest is a straight line: each further layer takes what the second took. What does not grow with layers (embedding, head,
loss) is in the first. The optimizer is tried on the two-layer model and scaled by parameters.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass

import torch

from waypost.core.batch import Batch
from waypost.kernels import select
from waypost.model import hf
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.train.optimizers import Optimizer
from waypost.train.recipe import TrainRecipe

REPEATS = 3
LEAST_S = 0.3
"""Short steps are tried for so many seconds: the best of a few hundredths of a second is luck."""


@dataclass
class _Trial:
    """A model of the recipe's first layers, and the best that was seen of it."""

    model: Decoder
    optimizer: Optimizer
    micro: float = math.inf
    """Seconds of a micro-batch, forward and backward."""
    update: float = math.inf
    """Seconds of the gradient's norm and the optimizer's step."""

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def step_seconds(recipe: TrainRecipe, config: ModelConfig, micro_tokens: int, micro_batches: int) -> float:
    """Predicted seconds of a step on one rank. Takes the time of at least four micro-batches through three layers."""
    count = len(config.layers)
    trials = [_trial(recipe, config, n) for n in sorted({1, min(2, count)})]
    batch = recipe.objective.prepare(_rows(config.vocab_size, micro_tokens, recipe.data.seq_len), 0)
    began, done = math.inf, 0
    while done <= REPEATS or time.perf_counter() - began < LEAST_S:
        for trial in trials:  # in turn, so that what else the machine does meets both
            micro, update = _once(recipe, trial, batch)
            if done:  # the first one warms up
                trial.micro, trial.update = min(trial.micro, micro), min(trial.update, update)
        began, done = min(began, time.perf_counter()), done + 1
    first, last = trials[0], trials[-1]
    whole = first.micro + max(0.0, last.micro - first.micro) * (count - 1)
    grown = last.parameters - first.parameters
    return micro_batches * whole + last.update * (first.parameters + grown * (count - 1)) / last.parameters


def _trial(recipe: TrainRecipe, config: ModelConfig, num_layers: int) -> _Trial:
    """The first `num_layers` layers, with fresh weights."""
    small = dataclasses.replace(config, layers=config.layers[:num_layers])
    model = Decoder(small, select(recipe.numerics, recipe.kernel)).initialise(0)
    recipe.precision.apply(model)
    rename = hf.hf_renamer(small)
    return _Trial(model, recipe.optimizer.build([(rename(name), p) for name, p in model.named_parameters()]))


def _once(recipe: TrainRecipe, trial: _Trial, batch: Batch) -> tuple[float, float]:
    """(seconds of a micro-batch, seconds of an update)."""
    began = time.perf_counter()
    if recipe.reweighting is not None:
        recipe.objective.losses(trial.model, batch)
    recipe.memory.forward_backward(trial.model, batch, recipe.objective, float(batch.num_tokens))
    middle = time.perf_counter()
    sum(trial.model.ops.squared_norm(p.grad) for p in trial.model.parameters() if p.grad is not None and p.numel())
    trial.optimizer.step(gradient_scale=1.0)
    trial.optimizer.zero_grad(set_to_none=True)
    return middle - began, time.perf_counter() - middle


def _rows(vocab_size: int, tokens: int, seq_len: int) -> Batch:
    """`tokens` random tokens in rows of `seq_len`; of the vocabulary's lower half, since ids at its end may be no text."""
    ids = torch.randint(0, max(1, vocab_size // 2), (tokens + 1,), generator=torch.Generator().manual_seed(0))
    parts = [slice(at, at + seq_len) for at in range(0, tokens, seq_len)]
    return Batch.of(
        [ids[:-1][p] for p in parts], targets=[ids[1:][p] for p in parts], weights=[torch.ones(len(ids[:-1][p])) for p in parts]
    )
