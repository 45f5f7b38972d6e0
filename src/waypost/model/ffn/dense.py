"""Gated feed-forward (SwiGLU).

Source    Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, eq. 6
Equation  out = W_down (silu(W_gate h) * W_up h)
Shapes    h (T, C) -> (T, C);  F = intermediate_size
Acts on   each row alone
Differs   nothing
Exact     splitting F into parts and adding their outputs is the same function (to rounding)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from waypost.core.config import technique
from waypost.model.kept import Kept
from waypost.model.linear.dense import Linear
from waypost.model.rows import Rows

if TYPE_CHECKING:
    from waypost.model.config import ModelConfig


@technique
class Dense:
    intermediate_size: int
    bias: bool = False

    def build(self, config: ModelConfig, layer: int) -> DenseFfn:
        return DenseFfn(config.hidden_size, self.intermediate_size, self.bias)

    def keeps(self, hidden_size: int) -> Kept:
        """gate, up and silu(gate) * up of a token; what autograd holds of each until its gradient is taken."""
        return Kept(narrow=3 * self.intermediate_size, cheap=self.intermediate_size, passing=2 * self.intermediate_size)


class DenseFfn(nn.Module):
    """h (T, C) -> (T, C): down(silu(gate(h)) * up(h)), with Hugging Face's parameter names."""

    def __init__(self, hidden: int, intermediate: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias)
        self.up_proj = Linear(hidden, intermediate, bias)
        self.down_proj = Linear(intermediate, hidden, bias)

    def forward(self, h: Tensor, rows: Rows) -> Tensor:
        return self.down_proj(rows.ops.swiglu(self.gate_proj(h, rows), self.up_proj(h, rows)), rows)
