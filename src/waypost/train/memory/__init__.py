"""Memory: how one micro-batch goes forward and backward, and what is kept in between."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from waypost.core.batch import Batch
from waypost.model.decoder import Decoder
from waypost.train.memory._held import Held, Sizes, sizes
from waypost.train.memory.plain import Plain
from waypost.train.memory.recompute import Recompute
from waypost.train.memory.seco import Seco
from waypost.train.memory.selective import Selective
from waypost.train.memory.stream_bp import StreamBp
from waypost.train.objectives import Objective


class Memory(Protocol):
    """Adds the gradient of objective / divisor to the parameters' gradients and changes nothing else.

    Returns the objective's sums with "loss", its weighted sum before the division, all detached. Runs forward and
    backward through the model's own call, so that a sharded model reduces its gradients once a step.
    `pieces` says in how many calls of a layer a micro-batch of that many tokens goes forward: ranks that meet inside layers
    need equally many. `holds` says in bytes what it holds of layer `index`, of the given sizes, for a micro-batch of `tokens`;
    a pure function, which `waypost plan` adds up. Invariants: equal to `plain`, to the bit where the technique says so; what
    is counted while it runs is what it says, within a tenth.
    """

    def pieces(self, tokens: int) -> int: ...

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held: ...

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]: ...


__all__ = ["MEMORIES", "Held", "Memory", "Plain", "Recompute", "Seco", "Selective", "Sizes", "StreamBp", "sizes"]

MEMORIES: Mapping[str, type[Memory]] = {
    "plain": Plain,
    "recompute": Recompute,
    "selective": Selective,
    "stream_bp": StreamBp,
    "seco": Seco,
}
