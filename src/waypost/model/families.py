"""The stock classes: how the config.json of each Hugging Face family spells its layers.

A family is a row of facts; reading and writing are the same few lines for all of them. Sources: the configuration and
modelling files of transformers 4.57 and 5.23 for each model_type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from waypost.core.config import build
from waypost.core.errors import ConfigError
from waypost.model.config import LayerSpec
from waypost.model.ffn import Dense, Moe
from waypost.model.mixer import Attention

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """A config.json field and the value that its absence means."""

    name: str
    absent: Any


Fact = bool | Field
"""Always so, never so, or as the field says."""


@dataclass(frozen=True)
class Family:
    """One model_type. Window kinds: `every` layer has `sliding_window`; `switched` by use_sliding_window for all;
    `by_layer` switched, then layer_types, or else a rule: `tail` windows the layers from max_window_layers on,
    `alternate` every other layer below it."""

    architecture: str
    qkv_bias: Fact = False
    o_bias: Fact = False
    mlp_bias: Fact = False
    qk_norm: Literal["none", "head", "full"] = "none"
    norm: Literal["pre", "post"] = "pre"
    window: Literal["none", "every", "switched", "by_layer"] = "none"
    window_rule: Literal["tail", "alternate"] = "tail"
    sliding_window: int | None = 4096
    """What an absent `sliding_window` means."""
    max_window_layers: int = 28
    head_dim: int | None = None
    """What an absent `head_dim` means; None is hidden_size // num_attention_heads."""
    experts: Literal["none", "mixtral", "qwen"] = "none"
    shared_expert: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    whole_heads: bool = False
    """The stock class insists that num_attention_heads divides hidden_size."""


_ATTENTION_BIAS = Field("attention_bias", False)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM", _ATTENTION_BIAS, _ATTENTION_BIAS, Field("mlp_bias", False), whole_heads=True
    ),
    "mistral": Family("MistralForCausalLM", window="every"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="by_layer"),
    "qwen3": Family(
        "Qwen3ForCausalLM", _ATTENTION_BIAS, _ATTENTION_BIAS, qk_norm="head", window="by_layer", head_dim=128
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", _ATTENTION_BIAS, _ATTENTION_BIAS, qk_norm="full", norm="post", rms_norm_eps=1e-5
    ),
    "mixtral": Family(
        "MixtralForCausalLM", window="every", sliding_window=None, experts="mixtral", rms_norm_eps=1e-5, rope_theta=1e6
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM", Field("qkv_bias", True), window="by_layer", window_rule="alternate", experts="qwen",
        shared_expert=True,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", _ATTENTION_BIAS, _ATTENTION_BIAS, qk_norm="head", window="switched", experts="qwen"
    ),
}  # fmt: skip


def need(tree: Tree, *names: str) -> Any:
    """The value of the first of `names` that config.json gives, or a ConfigError."""
    found = next((tree[name] for name in names if tree.get(name) is not None), None)
    if found is None:
        raise ConfigError(f"config.json: '{' or '.join(names)}' is missing; a {tree.get('model_type')} model needs it")
    return found


MOST_LAYERS = 10_000
"""More are a slip: each takes memory before the first weight is looked at."""


def whole_number(tree: Tree, *names: str) -> int:
    """As `need`, for a count of at least one."""
    value = need(tree, *names)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {names[0]}={value!r} must be a whole number of at least 1")
    return value


def read_layers(family: Family, tree: Tree) -> list[LayerSpec]:
    """The layers that `tree` describes, as the stock class would build them."""
    count = whole_number(tree, "num_hidden_layers")
    if count > MOST_LAYERS:
        raise ConfigError(f"config.json: num_hidden_layers={count} must be at most {MOST_LAYERS:,}")
    heads, hidden = whole_number(tree, "num_attention_heads"), whole_number(tree, "hidden_size")
    head_dim = tree.get("head_dim") or family.head_dim
    if head_dim is None and hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; give 'head_dim'"
        )
    attention = {
        "num_attention_heads": heads,
        "num_key_value_heads": tree.get("num_key_value_heads") or heads,
        "head_dim": head_dim or hidden // heads,
        "qkv_bias": _fact(family.qkv_bias, tree),
        "o_bias": _fact(family.o_bias, tree),
        "qk_norm": family.qk_norm,
    }
    windows = _windows(family, tree, count)
    sparse = _sparse_layers(family, tree, count)
    mixers = {w: build(Attention, {**attention, "window": w}, "config.json") for w in dict.fromkeys(windows)}
    ffns = {s: _ffn(family, tree, s) for s in dict.fromkeys(sparse)}
    kinds = {(w, s): LayerSpec(mixer=mixers[w], ffn=ffns[s], norm=family.norm) for w, s in zip(windows, sparse, strict=True)}
    return [kinds[kind] for kind in zip(windows, sparse, strict=True)]


def _fact(fact: Fact, tree: Tree) -> bool:
    if isinstance(fact, bool):
        return fact
    value = tree.get(fact.name)
    return bool(fact.absent if value is None else value)


def _windows(family: Family, tree: Tree, count: int) -> list[int | None]:
    """The window of each layer."""
    given = tree.get("layer_types")
    if given is not None and (len(given) != count or set(given) - {"full_attention", "sliding_attention"}):
        raise ConfigError(
            f"config.json: layer_types={given!r} must name 'full_attention' or 'sliding_attention' for each of the "
            f"{count} layers; other kinds of layer are not supported"
        )
    window = tree.get("sliding_window", family.sliding_window)
    if family.window == "none" or (family.window != "every" and not tree.get("use_sliding_window", False)):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigError(f"config.json: sliding_window={window!r} must be a whole number of at least 1, or null")
    windows = [window] * count
    if window is not None and family.window == "by_layer":
        first = tree.get("max_window_layers", family.max_window_layers)
        tail = family.window_rule == "tail"
        rule = [i >= first if tail else i < first and i % 2 == 0 for i in range(count)]
        slides = [kind == "sliding_attention" for kind in given] if given is not None else rule
        windows = [window if slide else None for slide in slides]
    if given is not None and [w is not None for w in windows] != [kind == "sliding_attention" for kind in given]:
        raise ConfigError(
            f"config.json: layer_types does not agree with sliding_window={tree.get('sliding_window')!r} and "
            f"use_sliding_window={tree.get('use_sliding_window')!r} of a {tree.get('model_type')} model; correct either"
        )
    return windows


def _sparse_layers(family: Family, tree: Tree, count: int) -> list[bool]:
    """Which layers route to experts."""
    if family.experts != "qwen":
        return [family.experts == "mixtral"] * count
    dense, step = tree.get("mlp_only_layers") or [], tree.get("decoder_sparse_step", 1)
    if not isinstance(step, int) or step < 1:
        raise ConfigError(f"config.json: decoder_sparse_step={step!r} must be a whole number of at least 1")
    return [i not in dense and (i + 1) % step == 0 for i in range(count)]


def _ffn(family: Family, tree: Tree, sparse: bool) -> Dense | Moe:
    if not sparse:
        width = whole_number(tree, "intermediate_size")
        return Dense(intermediate_size=width, bias=_fact(family.mlp_bias, tree))
    names = ("num_experts", "num_local_experts")
    mixtral = family.experts == "mixtral"
    return Moe(
        num_experts=whole_number(tree, *(reversed(names) if mixtral else names)),
        num_experts_per_tok=whole_number(tree, "num_experts_per_tok"),
        intermediate_size=whole_number(tree, "intermediate_size" if mixtral else "moe_intermediate_size"),
        norm_topk_prob=mixtral or bool(tree.get("norm_topk_prob", False)),
        shared_intermediate_size=whole_number(tree, "shared_expert_intermediate_size") if family.shared_expert else None,
    )


def write_layers(family: Family, layers: list[LayerSpec], hidden_size: int) -> dict[str, Any] | None:
    """The fields that spell `layers` for the stock class, or None where it cannot express them."""
    mixers = [layer.mixer for layer in layers if isinstance(layer.mixer, Attention)]
    dense = [layer.ffn for layer in layers if isinstance(layer.ffn, Dense)]
    sparse = [layer.ffn for layer in layers if isinstance(layer.ffn, Moe)]
    if len(mixers) != len(layers) or len(dense) + len(sparse) != len(layers):
        return None
    first = mixers[0]
    if family.whole_heads and hidden_size % first.num_attention_heads:
        return None
    tree: dict[str, Any] = {
        "num_hidden_layers": len(layers),
        "num_attention_heads": first.num_attention_heads,
        "num_key_value_heads": first.num_key_value_heads,
        "head_dim": first.head_dim,
        "hidden_act": "silu",
    }
    if dense:
        tree["intermediate_size"] = dense[0].intermediate_size
    facts = ((family.qkv_bias, first.qkv_bias), (family.mlp_bias, bool(dense) and dense[0].bias))
    tree.update({fact.name: value for fact, value in facts if isinstance(fact, Field)})
    tree.update(_write_windows(family, [mixer.window for mixer in mixers]))
    if sparse:
        tree.update(_write_experts(family, sparse[0]))
    if family.experts == "qwen":
        tree["mlp_only_layers"] = [i for i, layer in enumerate(layers) if isinstance(layer.ffn, Dense)]
        tree["decoder_sparse_step"] = 1
    try:
        same = read_layers(family, {**tree, "hidden_size": hidden_size}) == layers
    except ConfigError:  # a field that this family needs is not among what the layers hold
        same = False
    return tree if same else None


def _write_windows(family: Family, windows: list[int | None]) -> dict[str, Any]:
    if family.window == "none":
        return {}
    window = next((w for w in windows if w is not None), None)
    tree: dict[str, Any] = {"sliding_window": window}
    if family.window != "every":
        tree["use_sliding_window"] = window is not None
    if family.window == "by_layer":
        tree["layer_types"] = ["full_attention" if w is None else "sliding_attention" for w in windows]
        tree["max_window_layers"] = next((i for i, w in enumerate(windows) if w is not None), len(windows))
    return tree


def _write_experts(family: Family, moe: Moe) -> dict[str, Any]:
    tree: dict[str, Any] = {"num_experts_per_tok": moe.num_experts_per_tok, "num_local_experts": moe.num_experts}
    if family.experts == "mixtral":
        return {**tree, "intermediate_size": moe.intermediate_size}
    tree.update(num_experts=moe.num_experts, moe_intermediate_size=moe.intermediate_size, norm_topk_prob=moe.norm_topk_prob)
    if moe.shared_intermediate_size is not None:
        tree["shared_expert_intermediate_size"] = moe.shared_intermediate_size
    return tree
