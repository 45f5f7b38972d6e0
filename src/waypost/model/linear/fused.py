"""Projections of one input as one product, for serving: q, k, v together, gate and up together.

`fuse` is applied to a loaded model from outside. Parameters stay as they are, under their names; each group of siblings
gets one fused operand beside them, which follows them when they change in place. The bits stay what they were; where a
fused product would give others on this machine, the projections are left apart.

Shapes: T rows, C hidden_size, K inputs, N outputs of all parts together; H, G, D as in model/mixer/attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from waypost.kernels.linear.packed import PackedLinear, Product
from waypost.kernels.linear.rows import differing_count, trial_input
from waypost.kernels.ops import ROW_TILE, LinearOp
from waypost.model.decoder import Decoder
from waypost.model.ffn.dense import DenseFfn
from waypost.model.linear.dense import Linear
from waypost.model.mixer.attention import AttentionMixer
from waypost.model.rows import Rows


class FusedGroup:
    """Linears of the same input as one product, whose columns are theirs in order."""

    def __init__(self, parts: Sequence[Linear], linear: LinearOp) -> None:
        self.parts = parts
        self.widths = [part.weight.shape[0] for part in self.parts]
        self._linear = linear
        self._refresh()

    def __call__(self, x: Tensor) -> Tensor:  # (T, K) -> (T, N)
        self._follow()
        if isinstance(self._operand, Tensor):
            return self._linear(x, self._operand, self._bias)
        return self._operand(x, self._bias)

    def packed(self) -> tuple[Product, Tensor | None] | None:
        """The operand and the bias, where the kernels pack them."""
        self._follow()
        return None if isinstance(self._operand, Tensor) else (self._operand, self._bias)

    def _follow(self) -> None:
        if self._versions != [part.weight._version for part in self.parts]:
            self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        weights = [part.weight.detach() if not part.weight.is_meta else part.weight for part in self.parts]
        packed = self._linear.pack(weights) if isinstance(self._linear, PackedLinear) else None
        self._operand: Tensor | Product = torch.cat(weights) if packed is None else packed
        biases = [part.bias.detach() for part in self.parts if part.bias is not None]
        self._bias = torch.cat(biases) if biases else None
        self._versions = [part.weight._version for part in self.parts]


class FusedAttention(AttentionMixer):
    """Takes the place of an AttentionMixer, with its parameters; queries and keys without norms rotate in one call."""

    def __init__(self, mixer: AttentionMixer, group: FusedGroup) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(mixer.__dict__)
        self.group = group

    def forward(self, h: Tensor, rows: Rows) -> Tensor:  # (T, C) -> (T, C)
        spec, out = self.spec, rows.adapted(self.group.parts, h, self.group(h))
        if self.q_norm is None:
            heads = out.view(len(h), -1, spec.head_dim)  # (T, H + 2 G, D)
            rotating = spec.num_attention_heads + spec.num_key_value_heads
            qk = self._rotate(heads[:, :rotating], rows)
            q, k, v = qk[:, : spec.num_attention_heads], qk[:, spec.num_attention_heads :], heads[:, rotating:]
        else:
            q, k, v = out.split(self.group.widths, dim=1)
            q = self._rotate(self._heads(q, self.q_norm, rows), rows)
            k, v = self._rotate(self._heads(k, self.k_norm, rows), rows), self._heads(v, None, rows)
        return self.attend(q, k, v, rows)


class FusedFfn(DenseFfn):
    """Takes the place of a DenseFfn, with its parameters."""

    def __init__(self, ffn: DenseFfn, group: FusedGroup) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(ffn.__dict__)
        self.group = group

    def forward(self, h: Tensor, rows: Rows) -> Tensor:  # (T, C) -> (T, C)
        gate, up = rows.adapted(self.group.parts, h, self.group(h)).split(self.group.widths, dim=1)
        return self.down_proj(rows.ops.swiglu(gate, up), rows)


@torch.no_grad()
def fuse(model: Decoder) -> Decoder:
    """Fuses the plain projections of `model`, in place, and returns it. For inference: no gradient passes a group."""
    equal: dict[tuple[object, ...], bool] = {}  # a shape is tried once
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if type(module) is AttentionMixer:
                group = _group([module.q_proj, module.k_proj, module.v_proj], model.ops.linear, equal)
                if group is not None:
                    setattr(parent, name, FusedAttention(module, group))
            elif type(module) is DenseFfn:
                group = _group([module.gate_proj, module.up_proj], model.ops.linear, equal)
                if group is not None:
                    setattr(parent, name, FusedFfn(module, group))
    return model


def _group(parts: list[Linear], linear: LinearOp, equal: dict[tuple[object, ...], bool]) -> FusedGroup | None:
    """The parts fused, or None where one of them is no plain linear, they are stored in different ways, or the fused product
    has other bits."""
    if any(type(part) is not Linear for part in parts):
        return None
    if isinstance(linear, PackedLinear) and not linear.joins([part.weight for part in parts]):
        return None
    group = FusedGroup(parts, linear)
    weight, bias = parts[0].weight, parts[0].bias
    shape = (*group.widths, *weight.shape, weight.dtype, stored_as(weight, linear), bias is None)
    if shape not in equal:
        equal[shape] = _same_bits(group, linear)
    return group if equal[shape] else None


def stored_as(weight: Tensor, linear: LinearOp) -> tuple[int, int] | None:
    """(bits, inputs of a group) of a weight that `linear` knows in few bits; None of any other."""
    few = linear.stored(weight) if isinstance(linear, PackedLinear) else None
    return None if few is None else (few.bits, few.group_size)


def _same_bits(group: FusedGroup, linear: LinearOp) -> bool:
    weight = group.parts[0].weight
    x = trial_input(weight.shape[1], sum(group.widths), weight.dtype)
    apart = torch.cat([linear(x, part.weight, part.bias) for part in group.parts], dim=1)
    return differing_count(group, x, apart, (len(x), ROW_TILE)) is None
