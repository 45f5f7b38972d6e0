"""config.json of Hugging Face folders, read into a ModelConfig and written back.

Read in the style of transformers 4 (rope_theta, rope_scaling, torch_dtype) and of transformers 5 (rope_parameters, dtype,
layer_types); written so that both read it. A field that would change the function and that no part of Waypost honours is
an error; every other field is kept in `ModelConfig.hf_extras` and written back. Layers that no stock class can express
are written under `waypost_layers`, with model_type "waypost".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from waypost.core.config import build, to_tree
from waypost.core.errors import ConfigError, nearest
from waypost.model.config import LayerSpec, ModelConfig
from waypost.model.families import FAMILIES, Family, Tree, need, read_layers, whole_number, write_layers
from waypost.model.position.rope import Rope

WAYPOST = "waypost"
LAYERS_KEY = "waypost_layers"

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": (None, "silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    "attention_dropout": (None, 0, 0.0),
    "hidden_dropout": (None, 0, 0.0),
    "resid_pdrop": (None, 0, 0.0),
    "embd_pdrop": (None, 0, 0.0),
    "router_jitter_noise": (None, 0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "scale_emb": (None, 1, 1.0),
    "clip_qkv": (None,),
    "attention_chunk_size": (None,),
    "attention_sink": (None, False),
    "rope_interleaved": (None, False),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "quantization_config": (None,),
}
"""Fields that would change the function, with the values at which they do not; any other value is refused."""

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_PLAIN = (
    "vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields that ModelConfig holds under the same name."""
OWN = ("norm_gain", "embedding_projection")
"""Fields of ModelConfig that no stock class has: at any value but the default the model is written as "waypost"."""


def config_from_hf(tree: Tree) -> ModelConfig:
    """The architecture that a config.json describes.

    ConfigError: a model_type without a family here, a missing size, or a field that would change the function.
    """
    name = tree.get("model_type")
    if name not in FAMILIES and name != WAYPOST:
        known = nearest(str(name), [*FAMILIES, WAYPOST])
        raise ConfigError(f"config.json: model_type={name!r} is not supported.{known}")
    for key, allowed in NEUTRAL.items():
        if key == "quantization_config" and tree.get(key) is not None:
            raise ConfigError(
                "config.json: quantization_config: its weights are quantised, which is for inference; to train or transform "
                "it, take the folder it was made from, or widen it: waypost export CKPT OUT --weights-only --dtype bf16"
            )
        if tree.get(key) not in allowed:
            shown = "..." if isinstance(tree[key], Mapping) else repr(tree[key])
            raise ConfigError(
                f"config.json: {key}={shown} changes what the model computes and is not supported; "
                f"supported: {', '.join(map(repr, allowed))}"
            )
    family = FAMILIES.get(str(name))
    plain = {key: tree[key] for key in (*_PLAIN, *OWN) if tree.get(key) is not None}
    for key in ("vocab_size", "hidden_size", "max_position_embeddings"):
        plain[key] = whole_number(tree, key)
    if family is not None:
        plain.setdefault("rms_norm_eps", family.rms_norm_eps)
    layers: Any = read_layers(family, tree) if family is not None else need(tree, LAYERS_KEY)
    return build(
        ModelConfig,
        {
            **plain,
            "model_type": name,
            "rope": _read_rope(tree, 10000.0 if family is None else family.rope_theta),
            "layers": layers if family is not None else _own_layers(layers),
            "hf_extras": {key: value for key, value in tree.items() if key not in (*_PLAIN, *OWN, "model_type", LAYERS_KEY)},
        },
        "config.json",
    )


def _own_layers(trees: Sequence[Any]) -> list[LayerSpec]:
    return [build(LayerSpec, tree, f"config.json: {LAYERS_KEY}[{i}]") for i, tree in enumerate(trees)]


def _read_rope(tree: Tree, theta: float) -> Rope:
    """Rotary positions of either style. Where both styles are given they must agree."""
    found = [
        _rope_of(tree[key], tree, theta, key)
        for key in ("rope_scaling", "rope_parameters")
        if isinstance(tree.get(key), Mapping) and tree[key]
    ]
    if "rope_parameters" not in tree and not found:
        return _rope_of({}, tree, theta, "rope_theta")
    if not found:
        found = [_rope_of({}, tree, theta, "rope_theta")]
    if any(rope != found[0] for rope in found):
        raise ConfigError("config.json: rope_scaling and rope_parameters disagree; keep one of them")
    stated = tree.get("rope_theta")
    if stated is not None and stated != found[0].theta:
        raise ConfigError(
            f"config.json: rope_theta={stated} and rope_parameters.rope_theta={found[0].theta} disagree; correct either"
        )
    return found[0]


def _rope_of(values: Tree, tree: Tree, theta: float, where: str) -> Rope:
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE_KEYS:
        raise ConfigError(f"config.json: {where}.rope_type={kind!r} is not supported.{nearest(str(kind), _ROPE_KEYS)}")
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(f"config.json: {where}.partial_rotary_factor must be 1; partial rotation is not supported")
    common = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    strange = [key for key in values if key not in (*common, *_ROPE_KEYS[kind])]
    if strange:
        raise ConfigError(f"config.json: {where}.{strange[0]} has no meaning for rope_type '{kind}' here; remove it")
    missing = [key for key in _ROPE_KEYS[kind][:3] if key not in values]
    if missing:
        raise ConfigError(f"config.json: {where}.{missing[0]} is missing; rope_type '{kind}' needs it")
    fields = {key: values[key] for key in _ROPE_KEYS[kind] if key in values}
    if kind == "llama3":
        fields.setdefault("original_max_position_embeddings", whole_number(tree, "max_position_embeddings"))
    base = next((t for t in (values.get("rope_theta"), tree.get("rope_theta")) if t is not None), theta)
    return build(Rope, {"theta": base, "rope_type": kind, **fields}, f"config.json: {where}")


def _write_rope(rope: Rope) -> dict[str, Any]:
    scaling = {"rope_type": rope.rope_type, **{key: getattr(rope, key) for key in _ROPE_KEYS[rope.rope_type]}}
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.rope_type == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }


def stock_type(config: ModelConfig) -> str:
    """The model_type that `config` is written with: its own, or the first that expresses it, or else "waypost"."""
    if _own_fields(config):
        return WAYPOST
    for name in dict.fromkeys([config.model_type, *FAMILIES]):
        family = FAMILIES.get(name)
        if family is not None and write_layers(family, config.layers, config.hidden_size) is not None:
            return name
    return WAYPOST


def _own_fields(config: ModelConfig) -> dict[str, Any]:
    """What `config` has of OWN that is not the default."""
    given = {key: getattr(config, key) for key in OWN}
    return {key: value for key, value in given.items() if value != ModelConfig.__dataclass_fields__[key].default}


def config_to_hf(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """`config` as a config.json that transformers 4 and 5 read (and Waypost alone, where no stock class fits).

    `dtype` is what the weight files hold; None keeps what the original config.json said.
    """
    name = stock_type(config)
    family = FAMILIES.get(name)
    derived: dict[str, Any] = {
        "architectures": ["WaypostForCausalLM" if family is None else family.architecture],
        "model_type": name,
        **{key: getattr(config, key) for key in _PLAIN},
        **_own_fields(config),
        **_write_rope(config.rope),
        **_layer_fields(config, family),
    }
    verbatim = {**derived, **config.hf_extras, "model_type": name, "architectures": derived["architectures"]}
    stale = () if family is not None and family.window == "by_layer" else ("layer_types",)
    kept = {key: value for key, value in config.hf_extras.items() if key not in stale}
    tree = verbatim if family is not None and _describes(verbatim, config) else {**kept, **derived}
    if family is not None:
        tree.setdefault("intermediate_size", tree.get("moe_intermediate_size"))
    if dtype is not None:
        tree["dtype"] = tree["torch_dtype"] = str(dtype).removeprefix("torch.")
    return tree


def _layer_fields(config: ModelConfig, family: Family | None) -> dict[str, Any]:
    fields = None if family is None else write_layers(family, config.layers, config.hidden_size)
    if fields is not None:
        return fields
    return {"num_hidden_layers": len(config.layers), LAYERS_KEY: [to_tree(layer) for layer in config.layers]}


def _describes(tree: Tree, config: ModelConfig) -> bool:
    """Whether reading `tree` gives `config`, kept fields aside."""
    try:
        found = config_from_hf(tree)
    except ConfigError:
        return False
    return replace(found, hf_extras={}, model_type="") == replace(config, hf_extras={}, model_type="")


def with_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """`config` stating the dtype that the weights now have, where it stated one."""
    stated: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if key in config.hf_extras}
    return replace(config, hf_extras={**config.hf_extras, **stated}) if stated else config


def read_config(folder: str | Path) -> ModelConfig:
    """The config.json of `folder`. A missing or malformed one is a ConfigError."""
    path = Path(folder) / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a model folder") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, expected an object")
    return config_from_hf(tree)
