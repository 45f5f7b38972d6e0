"""Weights in 8 or 4 bits with a scale for every group of inputs: x W^T without ever holding W (quantized.cpp).

The weight that is meant is bfloat16(float32(q) * float32(scale)); the product has the bits of the dense one over those.

Shapes: T rows, K inputs, N outputs, G inputs a group; words hold 32 / bits inputs each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from waypost.core.errors import ShapeError
from waypost.kernels import memory
from waypost.kernels.call import kernels
from waypost.kernels.linear.cpu import PANEL


@dataclass(frozen=True)
class QuantizedWeight:
    """words (N, ceil(K bits / 32)) int32 of q + 2^(bits-1), the first input in the lowest bits; scale (N, K / G) bfloat16."""

    words: Tensor
    scale: Tensor
    bits: int
    inputs: int

    def __post_init__(self) -> None:
        groups = self.scale.shape[1] if self.scale.ndim == 2 else 0
        width = -(-self.inputs * self.bits // 32)
        if (
            self.bits not in (4, 8)
            or self.words.shape != (self.scale.shape[0], width)
            or not groups
            or self.inputs % groups
            or self.inputs // groups % 2
        ):
            raise ShapeError(
                f"a weight of {self.bits} bits with {self.inputs} inputs in words {tuple(self.words.shape)} and scales "
                f"{tuple(self.scale.shape)}: bits must be 4 or 8, words (N, {width}), and every row must have one scale for "
                "each group of an even number of inputs"
            )

    @staticmethod
    def of(q: Tensor, scale: Tensor, bits: int) -> QuantizedWeight:
        """q (N, K) int8 in [-2^(bits-1), 2^(bits-1)), scale (N, K / G) bfloat16."""
        return QuantizedWeight(pack_integers(q, bits), scale, bits, q.shape[1])

    @property
    def group_size(self) -> int:
        return self.inputs // self.scale.shape[1]

    @property
    def q(self) -> Tensor:
        """(N, K) int8."""
        return unpack_integers(self.words, self.bits, self.inputs)

    def dense(self) -> Tensor:
        """(N, K) bfloat16."""
        wide = self.q.unflatten(1, (-1, self.group_size)).float() * self.scale.float()[:, :, None]
        return wide.flatten(1).bfloat16()


def pack_integers(q: Tensor, bits: int) -> Tensor:
    """q (N, K) int8 -> (N, ceil(K bits / 32)) int32; what is left of the last word is zero."""
    codes = F.pad((q.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8), (0, -q.shape[1] % (32 // bits)))
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes.contiguous().view(torch.int32)  # words and processor are little-endian


def unpack_integers(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The inverse of `pack_integers`: (N, words) int32 -> (N, inputs) int8."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    return (codes[:, :inputs].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


class QuantizedPanels:
    """Weights of the same inputs, bits and groups, one below the other, in the layout of the kernel: x (T, K) bfloat16,
    bias (N,) -> (T, N)."""

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        first = weights[0]
        if any((w.bits, w.inputs, w.group_size) != (first.bits, first.inputs, first.group_size) for w in weights):
            raise ShapeError("weights that are one product need the same inputs, bits and group size")
        self.bits, self.inputs, self.group_size = first.bits, first.inputs, first.group_size
        words = torch.cat([w.words for w in weights]) if len(weights) > 1 else first.words.contiguous()
        scale = torch.cat([w.scale for w in weights])
        self.outputs = len(words)
        pairs, group_pairs = self.inputs // 2, self.group_size // 2
        count, groups = -(-self.outputs // PANEL), scale.shape[1]
        blocks = groups * -(-group_pairs * self.bits // 32)
        self.panels = memory.empty((count, blocks, 2 * PANEL), torch.int32)
        kernels(scale).pack_quantized(
            self.bits, words.data_ptr(), self.outputs, words.shape[1], pairs, group_pairs, self.panels.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        scales = F.pad(scale, (0, 0, 0, count * PANEL - self.outputs)).unflatten(0, (-1, PANEL))  # (P, 48, K/G)
        self.scales = scales.transpose(1, 2).contiguous()

    @property
    def num_bytes(self) -> int:
        """What one product reads of it."""
        return self.panels.nbytes + self.scales.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.bfloat16 or x.shape[1] != self.inputs:
            raise ShapeError(f"rows {tuple(x.shape)} of {x.dtype}; this weight takes (T, {self.inputs}) in bfloat16")
        x = x.contiguous()
        out = torch.empty((x.shape[0], self.outputs), dtype=x.dtype)
        kernels(x).linear_quantized(
            self.bits, x.data_ptr(), x.shape[0], self.inputs // 2, self.panels.data_ptr(), self.scales.data_ptr(),
            self.group_size // 2, self.outputs, out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out if bias is None else out + bias
