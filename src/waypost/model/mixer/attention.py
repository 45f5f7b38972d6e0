"""Softmax attention with grouped keys and values, an optional window and optional query/key norms.

Source    Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, sec. 3.2; grouped: Ainslie et al. 2023,
          GQA, arXiv:2305.13245; window: Beltagy et al. 2020, Longformer, arXiv:2004.05150; query/key norm: Henry et al.
          2020, arXiv:2010.04245
Equation  out = softmax(q k^T / sqrt(D)) v over keys j with p - window < j <= p
Shapes    h (T, C) -> (T, C);  H query heads, G key/value heads, D head width
Acts on   each sequence of the batch alone
Differs   nothing
Exact     G = H is multi-head attention; window >= length is full attention, bit for bit
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from waypost.core.config import technique
from waypost.core.errors import ConfigError
from waypost.model.kept import Kept
from waypost.model.linear.dense import Linear
from waypost.model.norm import build_norm
from waypost.model.norm.rms import RmsNorm
from waypost.model.norm.single_scale import SingleScaleNorm
from waypost.model.rows import Rows

if TYPE_CHECKING:
    from waypost.model.config import ModelConfig


@technique
class Attention:
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    window: int | None = None
    """Keys that a position sees, itself included; None sees all."""
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm of queries and keys over each head (Qwen3) or over the whole projection (OLMo-2)."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"Attention: {self.num_attention_heads} query heads do not share {self.num_key_value_heads} key/value "
                "heads evenly; num_key_value_heads must divide num_attention_heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"Attention.head_dim={self.head_dim}: rotary positions pair channels, so it must be even")

    def build(self, config: ModelConfig, layer: int) -> AttentionMixer:
        return AttentionMixer(self, config, layer)

    def keeps(self, hidden_size: int) -> Kept:
        """Queries, keys, values and the output of a token with its log-sum-exp; queries and keys before their norms too."""
        queries, pairs = self.num_attention_heads * self.head_dim, 2 * self.num_key_value_heads * self.head_dim
        normed = {"none": 0, "head": self.num_attention_heads + self.num_key_value_heads, "full": 2}[self.qk_norm]
        before_norms = queries + pairs // 2 if normed else 0
        return Kept(narrow=2 * queries + pairs + before_norms, wide=self.num_attention_heads + normed, pairs=pairs)


class AttentionMixer(nn.Module):
    """h (T, C) -> (T, C): causal attention whose keys and values go where `rows` says, to the batch itself or to pages."""

    def __init__(self, spec: Attention, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.spec, self.rope, self.layer = spec, config.rope, layer
        width, hidden = spec.head_dim, config.hidden_size
        self.q_proj = Linear(hidden, spec.num_attention_heads * width, spec.qkv_bias)
        self.k_proj = Linear(hidden, spec.num_key_value_heads * width, spec.qkv_bias)
        self.v_proj = Linear(hidden, spec.num_key_value_heads * width, spec.qkv_bias)
        self.o_proj = Linear(spec.num_attention_heads * width, hidden, spec.o_bias)
        self.q_norm: RmsNorm | SingleScaleNorm | None = None
        self.k_norm: RmsNorm | SingleScaleNorm | None = None
        if spec.qk_norm != "none":
            heads = (spec.num_attention_heads, spec.num_key_value_heads) if spec.qk_norm == "full" else (1, 1)
            self.q_norm = build_norm(heads[0] * width, config.rms_norm_eps, config.norm_gain)
            self.k_norm = build_norm(heads[1] * width, config.rms_norm_eps, config.norm_gain)

    def forward(self, h: Tensor, rows: Rows) -> Tensor:
        return self.attend(self.project_q(h, rows), *self.project_kv(h, rows), rows)

    def project_q(self, h: Tensor, rows: Rows) -> Tensor:  # (T, C) -> (T, H, D)
        """Queries, (T, C) -> (T, H, D): normed where the family norms them, then rotated to their positions."""
        return self._rotate(self._heads(self.q_proj(h, rows), self.q_norm, rows), rows)

    def project_kv(self, h: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:  # (T, C) -> 2 x (T, G, D)
        """Keys, normed and rotated, and values, neither: (T, C) -> 2 x (T, G, D). What a cache stores."""
        k = self._rotate(self._heads(self.k_proj(h, rows), self.k_norm, rows), rows)
        return k, self._heads(self.v_proj(h, rows), None, rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Stores k and v for this layer, attends with q, projects out. (T, H, D), 2 x (T, G, D) -> (T, C)."""
        out = rows.kv.attend(self.layer, q, k, v, self.spec.head_dim**-0.5, self.spec.window, rows)
        return self.o_proj(out.flatten(1), rows)

    def _heads(self, x: Tensor, norm: RmsNorm | SingleScaleNorm | None, rows: Rows) -> Tensor:
        if norm is not None and self.spec.qk_norm == "full":
            x = norm(x, rows)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        return norm(x, rows) if norm is not None and self.spec.qk_norm == "head" else x

    def _rotate(self, x: Tensor, rows: Rows) -> Tensor:
        return rows.ops.rope(x, *rows.angles(self.rope, self.spec.head_dim))
