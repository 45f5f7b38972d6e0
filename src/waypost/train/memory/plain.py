"""plain: keep every activation of the micro-batch for its backward pass.

Source    Griewank and Walther 2008, Evaluating Derivatives, ch. 3 (reverse mode that stores every intermediate)
Equation  gradient += d(loss / divisor) / d(parameters)
Shapes    a batch of T tokens -> sums of the objective, detached
Acts on   one micro-batch
Differs   nothing
Exact     the reference for every other memory technique
"""

from __future__ import annotations

from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.config import technique
from waypost.model.decoder import Decoder
from waypost.train.memory._held import Held, Sizes
from waypost.train.objectives import Objective


@technique
class Plain:
    def pieces(self, tokens: int) -> int:
        return 1

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        kept = tokens * layer.kept
        return Held(kept, kept + tokens * layer.passing, tokens)

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]:
        loss, sums = objective.loss(model, batch)
        (loss / divisor).backward()
        return {"loss": loss.detach(), **sums}
