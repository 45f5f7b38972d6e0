"""recompute: keep each layer's input alone and run the layer again in the backward pass.

Source    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174, sec. 4
Equation  gradient += d(loss / divisor) / d(parameters), the layers' activations computed twice
Shapes    a batch of T tokens -> sums of the objective, detached
Acts on   every `every`-th layer of the model, for one micro-batch
Differs   nothing
Exact     the same bits as plain: a layer is a pure function of its input, so the second run equals the first
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from waypost.core.batch import Batch
from waypost.core.config import cost, technique
from waypost.core.errors import ConfigError
from waypost.model.decoder import Decoder
from waypost.train.memory._held import Held, Sizes
from waypost.train.memory.plain import Plain
from waypost.train.objectives import Objective


@contextmanager
def recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """While open, `layers` keep their inputs alone. Only `forward` is replaced: hooks of sharding stay outside."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own method shows again


@technique
class Recompute:
    every: int = cost(1)
    """Recompute layers 0, every, 2 every ...: 1 saves the most memory, larger values recompute less."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"Recompute.every={self.every}: must be at least 1")

    def pieces(self, tokens: int) -> int:
        return 1

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        whole = Plain().holds(layer, tokens, index)
        return replace(whole, kept=tokens * layer.hidden) if index % self.every == 0 else whole

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]:
        with recomputed(list(model.model.layers)[:: self.every]):
            return Plain().forward_backward(model, batch, objective, divisor)
