"""The floating-point operations that a model's function asks for, a token; a multiply-add counts as two.

Source    Kaplan et al. 2020, Scaling Laws for Neural Language Models, arXiv:2001.08361, sec. 2.1; a backward pass counts
          twice a forward one, recomputation does not count: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, app. B
Equation  forward = sum over layers of 2 * (weights of its active matrices) + 4 H D * keys, plus 2 C V for the head;
          keys = (L + 1) / 2, the mean over a causal sequence of L tokens, or with a window w < L:
          (w (w + 1) / 2 + (L - w) w) / L;   training = 3 * forward
Differs   attention counts the keys that the causal mask leaves, where both papers count all; norms, rotations, activations
          and the softmax are left out, as there: they are of order C, not C^2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from waypost.core.errors import ConfigError
from waypost.model.config import LayerSpec, ModelConfig
from waypost.model.ffn import Dense, Moe
from waypost.model.mixer import Attention

Keys = Callable[[int | None], float]
"""window -> keys that a token attends to"""


def forward_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward pass a token, the mean over a sequence of `seq_len` tokens."""
    return _total(config, lambda window: mean_keys(seq_len, window))


def training_flops(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of a forward and a backward pass a token, the mean over a sequence of `seq_len` tokens."""
    return 3.0 * forward_flops(config, seq_len)


def decode_flops(config: ModelConfig, context_tokens: int) -> float:
    """FLOPs of one generated token that follows `context_tokens` others."""
    return _total(config, _keys_after(context_tokens))


def prefill_flops(config: ModelConfig, tokens: int) -> float:
    """FLOPs from a prompt of `tokens` tokens to the logits that follow it, all of them: where nobody asks for more, the other
    rows need no more of the last layer than keys and values, and nothing of the head."""
    *before, last = config.layers
    hidden, others = config.hidden_size, tokens - 1
    projection = 2.0 * hidden * hidden if config.embedding_projection else 0.0
    every = sum(_layer(layer, hidden, lambda window: mean_keys(tokens, window)) for layer in before) + projection
    stored = _keys_and_values(last.mixer, hidden) if isinstance(last.mixer, Attention) else 0.0
    answer = _layer(last, hidden, _keys_after(others)) + 2.0 * hidden * config.vocab_size + projection
    return tokens * every + others * stored + answer


def mean_keys(seq_len: int, window: int | None = None) -> float:
    """Keys that a token of a causal sequence attends to, itself included; the mean over the sequence."""
    if window is None or window >= seq_len:
        return (seq_len + 1) / 2
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len


def _keys_after(context_tokens: int) -> Keys:
    return lambda window: float(min(context_tokens + 1, window or context_tokens + 1))


def _total(config: ModelConfig, keys: Keys) -> float:
    layers = sum(_layer(layer, config.hidden_size, keys) for layer in config.layers)
    projections = 2 * config.hidden_size if config.embedding_projection else 0
    return layers + 2.0 * config.hidden_size * (config.vocab_size + projections)


def _layer(layer: LayerSpec, hidden: int, keys: Keys) -> float:
    return _of(layer.mixer)(layer.mixer, hidden, keys) + _of(layer.ffn)(layer.ffn, hidden, keys)


def _attention(spec: Attention, hidden: int, keys: Keys) -> float:
    queries = spec.num_attention_heads * spec.head_dim
    return 4.0 * hidden * queries + _keys_and_values(spec, hidden) + 4.0 * queries * keys(spec.window)


def _keys_and_values(spec: Attention, hidden: int) -> float:
    return 4.0 * hidden * spec.num_key_value_heads * spec.head_dim


def _dense(spec: Dense, hidden: int, keys: Keys) -> float:
    return 6.0 * hidden * spec.intermediate_size


def _moe(spec: Moe, hidden: int, keys: Keys) -> float:
    routed = 2.0 * hidden * spec.num_experts + 6.0 * hidden * spec.intermediate_size * spec.num_experts_per_tok
    shared = spec.shared_intermediate_size
    return routed + (0.0 if shared is None else 6.0 * hidden * shared + 2.0 * hidden)


COUNTS: Mapping[type, Callable[[Any, int, Keys], float]] = {Attention: _attention, Dense: _dense, Moe: _moe}
"""Mixer or feed-forward -> its FLOPs a token."""


def _of(spec: object) -> Callable[[Any, int, Keys], float]:
    if type(spec) not in COUNTS:
        raise ConfigError(f"flops: no count for {type(spec).__qualname__}; add its row to waypost.measure.flops.COUNTS")
    return COUNTS[type(spec)]
