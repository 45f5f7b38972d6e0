"""selective: keep what is dear to compute, make the outputs of norms and gated products again in the backward pass.

Source    Korthikanti et al. 2022, Reducing Activation Recomputation in Large Transformer Models, arXiv:2205.05198, sec. 5
Equation  gradient += d(loss / divisor) / d(parameters), cheap activations computed twice
Shapes    a batch of T tokens -> sums of the objective, detached
Acts on   every tensor kept for a backward pass that is the output of an operator with a `recompute`
Differs   the paper recomputes attention's softmax, which our attention never holds; here the operators are those whose
          output costs a pass over memory and no matrix product: per layer and token 2 C + F of about 9 C + 3 F numbers
Exact     the same bits as plain: the operator runs again on the same inputs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.config import technique
from waypost.core.heap import trim
from waypost.model.decoder import Decoder
from waypost.train.memory._held import Held, Sizes
from waypost.train.memory.plain import Plain
from waypost.train.objectives import Objective


def pack(x: Tensor) -> Any:
    """The node that made `x`, where that node can make it again; else `x`."""
    node: Any = x.grad_fn
    if not hasattr(getattr(node, "_forward_cls", None), "recompute") or x._is_view():
        return x
    node.users = getattr(node, "users", 0) + 1
    return node


def unpack(kept: Any) -> Tensor:
    """What `pack` was given, made again for its first user and dropped after its last. The node is alive: its own backward
    runs after those of its users."""
    if isinstance(kept, Tensor):
        return kept
    if getattr(kept, "made", None) is None:
        kept.made = kept._forward_cls.recompute(kept)
    made: Tensor = kept.made
    kept.users -= 1
    if kept.users == 0:
        kept.made = None
    return made


@technique
class Selective:
    def pieces(self, tokens: int) -> int:
        return 1

    def holds(self, layer: Sizes, tokens: int, index: int) -> Held:
        return Held(tokens * (layer.kept - layer.cheap), tokens * (layer.kept + layer.passing), tokens)

    def forward_backward(self, model: Decoder, batch: Batch, objective: Objective, divisor: float) -> dict[str, Tensor]:
        # Memory peaks in the loss, just behind the last norm. What the layers made and freed in turn has left holes in the
        # heap by then: 126 MB of SmolLM2's 2.9 GB at 1,024 tokens, given back in 18 ms of a step of 3 s.
        handle = model.model.norm.register_forward_pre_hook(lambda *_: trim())
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return Plain().forward_backward(model, batch, objective, divisor)
        finally:
            handle.remove()
