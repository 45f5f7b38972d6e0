"""Routed feed-forward: each row goes to its top-k experts, and to a shared expert where there is one.

Source    Jiang et al. 2024, Mixtral of Experts, arXiv:2401.04088, sec. 2.1; shared expert: Qwen Team 2024, Qwen1.5-MoE;
          routing over the softmax of all experts: Shazeer et al. 2017, arXiv:1701.06538
Equation  out = sum_{e in top-k(p)} w_e E_e(h) [+ sigmoid(g h) E_shared(h)],  p = softmax(W_r h),
          w = p, or p / sum of the chosen p (norm_topk_prob)
Shapes    h (T, C) -> (T, C);  E experts
Acts on   each row alone; no expert is ever full, no token is dropped
Differs   nothing
Exact     E = k = 1 with norm_topk_prob is the dense feed-forward, bit for bit; experts add in ascending order
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.model.ffn.dense import DenseFfn
from waypost.model.kept import Kept
from waypost.model.linear.dense import Linear
from waypost.model.rows import Rows

if TYPE_CHECKING:
    from waypost.model.config import ModelConfig


@technique
class Moe:
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    """Width of one expert."""
    norm_topk_prob: bool = True
    shared_intermediate_size: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ConfigError(f"Moe.num_experts_per_tok={self.num_experts_per_tok}: must be in 1..{self.num_experts}")

    def build(self, config: ModelConfig, layer: int) -> MoeFfn:
        return MoeFfn(self, config.hidden_size)

    def keeps(self, hidden_size: int) -> Kept:
        """The routing of a token, and what its experts and the shared one hold."""
        # an expert's rows are no multiple of the tile: what its linears keep are padded copies, which nothing makes again
        k, shared = self.num_experts_per_tok, self.shared_intermediate_size or 0
        inner = k * self.intermediate_size + shared
        routing = self.num_experts + 8 * k  # probabilities; of the chosen their weights, which and where, in 64 bits
        return Kept(3 * inner + (4 * k + (2 if shared else 0)) * hidden_size, wide=routing, passing=inner)


class MoeFfn(nn.Module):
    """h (T, C) -> (T, C): each token through its best experts; an expert's bits do not depend on who else chose it."""

    def __init__(self, spec: Moe, hidden: int) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Linear(hidden, spec.num_experts, False)
        self.experts = nn.ModuleList(DenseFfn(hidden, spec.intermediate_size) for _ in range(spec.num_experts))
        self.shared_expert: DenseFfn | None = None
        if spec.shared_intermediate_size is not None:
            self.shared_expert = DenseFfn(hidden, spec.shared_intermediate_size)
            self.shared_expert_gate = Linear(hidden, 1, False)

    def forward(self, h: Tensor, rows: Rows) -> Tensor:
        weight_TK, choice_TK = self.route(h, rows)
        out = self.mix(h, weight_TK, choice_TK, rows)
        if self.shared_expert is not None:
            gate = sigmoid(self.shared_expert_gate(h, rows))
            out = out + gate * self.shared_expert(h, rows)
        return out

    def mix(self, h: Tensor, weight_TK: Tensor, choice_TK: Tensor, rows: Rows) -> Tensor:
        """What the chosen experts give, weighted and added in ascending order of experts. (T, C) -> (T, C)."""
        out = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            token, rank = torch.where(choice_TK == index)
            if not len(token) and not torch.is_grad_enabled():
                continue  # nobody chose it: its weights are not read; a gradient of zeros it has all the same
            part = expert(h[token], rows) * weight_TK[token, rank, None]
            out = out.index_add(0, token, part)
        return out

    def route(self, h: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """(weights, experts), each (T, k), in descending order of probability; the softmax is in float32."""
        wide = torch.promote_types(h.dtype, torch.float32)
        probability = torch.softmax(self.gate(h, rows).to(wide), dim=-1)
        weight, choice = torch.topk(probability, self.spec.num_experts_per_tok, dim=-1)
        if self.spec.norm_topk_prob:
            weight = weight / weight.sum(-1, keepdim=True)
        return weight.to(h.dtype), choice


def sigmoid(x: Tensor) -> Tensor:
    """(T, 1) -> (T, 1), as a softmax of (x, 0): torch.sigmoid's bits depend on the number of rows, softmax's do not."""
    return torch.softmax(torch.cat([x, torch.zeros_like(x)], dim=-1), dim=-1)[:, :1]
