"""A linear whose rows are rounded to 8 bits as its weights are, but for what stands out (kernels/linear/int8.py).

Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from waypost.core.errors import ConfigError
from waypost.kernels.linear import int8
from waypost.kernels.linear.quantized import QuantizedWeight
from waypost.model.linear.dense import Linear

if TYPE_CHECKING:
    from waypost.kernels.ops import Ops
    from waypost.model.decoder import Decoder
    from waypost.model.linear.scheme import Scheme


class Int8Linear(Linear):
    """Takes the place of a Linear (N, K), with its bias. Its `weight` has no storage: the numbers are in the product."""

    def __init__(self, linear: Linear, multiply: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self._multiply = multiply

    def product(self, x: Tensor, ops: Ops) -> Tensor:
        out = self._multiply(x)
        return out if self.bias is None else out + self.bias


def check_stored(model: Decoder) -> None:
    """ConfigError where weights of `model` have no storage, because they are computed from few bits; a model on the meta
    device, of names and shapes alone, has none at all."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty and any(not parameter.is_meta for parameter in model.parameters()):
        raise ConfigError(
            f"{empty[0]} ({len(empty)} in all) is quantised: it has no numbers to save or to train; take the folder it was "
            "made from, or widen it and load that: waypost export CKPT OUT --weights-only --dtype bf16"
        )


def put(model: Decoder, name: str, weight: QuantizedWeight, scheme: Scheme) -> None:
    """Gives the linear `name` of `model` its quantised weight, as it is computed with: dense, or with rows in 8 bits."""
    module = model.get_submodule(name)
    assert isinstance(module, Linear), name
    if scheme.rows is None:
        module.weight = nn.Parameter(weight.dense().to(model.dtype), requires_grad=False)
        return
    multiply: Callable[[Tensor], Tensor]
    if model.ops.compiled:
        multiply = int8.Int8Panels(weight, scheme.rows.threshold)
    else:
        multiply = functools.partial(int8.product, weight=weight, threshold=scheme.rows.threshold)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, Int8Linear(module, multiply))
