"""Rotary positions, with the scalings that public checkpoints use.

Source    Su et al. 2021, RoFormer, arXiv:2104.09864, sec. 3.2; linear: Chen et al. 2023, arXiv:2306.15595; llama3:
          Llama Team 2024, The Llama 3 Herd of Models, arXiv:2407.21783, and its reference code
Equation  angle(p, i) = p / theta^(2 i / D), i < D / 2; llama3 divides frequencies of wavelength above
          L / low_freq_factor by `factor`, keeps those below L / high_freq_factor, and blends between
Shapes    positions (T,) -> cos, sin (T, D / 2), float32
Acts on   queries and keys
Differs   nothing; cosines are taken in float64 of the float32 product, then rounded, so they do not depend on a vector unit
Exact     rope_type "linear" with factor 1 is "default", bit for bit
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from waypost.core.config import technique
from waypost.core.errors import ConfigError

TABLE_ROWS = 1024


@technique
class Rope:
    theta: float = 10000.0
    rope_type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.theta <= 0:
            raise ConfigError(f"Rope: theta={self.theta} and factor={self.factor} must be positive")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError("Rope: llama3 needs high_freq_factor above low_freq_factor")


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:  # -> (D / 2,) float32
    """Radians a position for each pair of channels, (D / 2,) float32, after the scaling that `rope` asks for."""
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.rope_type == "default":
        return base
    if rope.rope_type == "linear":
        return base / rope.factor
    wavelength = 2 * math.pi / base
    long = rope.original_max_position_embeddings / rope.low_freq_factor
    short = rope.original_max_position_embeddings / rope.high_freq_factor
    blend = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    middle = (1 - blend) * base / rope.factor + blend * base
    scaled = torch.where(wavelength > long, base / rope.factor, base)
    return torch.where((wavelength <= long) & (wavelength >= short), middle, scaled)


def angles(rope: Rope, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position, (T, D / 2) float32. Tables are made a fixed block of positions at a time."""
    blocks = int(positions.max()) // TABLE_ROWS + 1 if positions.numel() else 1
    cos, sin = _table(rope, head_dim, 1 << (blocks - 1).bit_length())
    return cos.index_select(0, positions), sin.index_select(0, positions)


@functools.lru_cache(maxsize=16)
def _table(rope: Rope, head_dim: int, blocks: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(blocks * TABLE_ROWS, dtype=torch.float32)
    angle = torch.outer(positions, inverse_frequencies(rope, head_dim)).double()
    return angle.cos().float(), angle.sin().float()
