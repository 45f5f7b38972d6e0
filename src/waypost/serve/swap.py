"""Other weights for a model that is being served, made beside those in use and exchanged between two steps.

Modes     abort: what is in flight ends as cancelled, with what it has
          wait:  what is in flight ends first, on the old weights; what is submitted meanwhile waits for the new ones
          keep:  what is in flight goes on at once; its later tokens come from the new weights over keys and values of the old,
                 and every token says which weights drew it (Draw.weight_version)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from waypost.core.errors import CheckpointError, ConfigError, nearest
from waypost.model.decoder import Decoder
from waypost.model.linear import quantized
from waypost.model.linear.layercast import widen_arithmetic

if TYPE_CHECKING:
    from waypost.kernels.ops import Ops
    from waypost.serve.scheduler import LiveSequence

Mode = Literal["abort", "wait", "keep"]

Weights = str | Path | Mapping[str, Tensor]
"""A checkpoint's path, or tensors under Hugging Face names; what is not named stays."""


@dataclass
class Pending:
    """A swap that has been asked for."""

    model: Decoder
    mode: Mode
    last_arrival: int
    """The last sequence that was submitted before it."""
    held: list[LiveSequence] = field(default_factory=list)
    """Sequences submitted since, which are for the new weights."""


def check_mode(mode: str) -> None:
    """ConfigError, with the nearest name, for a mode that is none."""
    if mode not in get_args(Mode):
        raise ConfigError(f"swap: no mode named '{mode}'.{nearest(mode, get_args(Mode))}")


def with_weights(model: Decoder, ops: Ops, weights: Weights) -> Decoder:
    """A decoder like `model`, on the plain operators `ops`, with other weights; `model` is left as it is.

    CheckpointError where the architecture, a name or a shape differs.
    """
    dtype = model.output_weight.dtype
    return widen_arithmetic(_other(model, ops, weights, dtype), model.dtype)


def _other(model: Decoder, ops: Ops, weights: Weights, dtype: torch.dtype) -> Decoder:
    from waypost.model import hf

    if isinstance(weights, Mapping):
        if any(parameter.is_meta for parameter in model.parameters()):
            raise CheckpointError("swap: the model being served is quantised; swap in a whole folder, not single tensors")
        stored = {entry.spec.name: entry.tensor for entry in hf.entries(model)}
        for name, tensor in weights.items():
            if name not in stored:
                raise CheckpointError(f"swap: the model has no tensor '{name}'.{nearest(name, tuple(stored))}")
            stored[name] = tensor.detach().to(dtype, copy=True)
        return hf.assemble(model.config, stored, dtype, ops, where="swap", copy=False)
    found = quantized.load(weights, dtype, ops, packed=model.dtype == torch.bfloat16)
    ours, theirs = model.config, found.config
    for name in ("vocab_size", "hidden_size", "rms_norm_eps", "norm_gain", "embedding_projection", "rope", "layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise CheckpointError(
                f"swap: {weights} has another {name} than the model being served; only weights can be swapped, start a "
                "new engine for another architecture"
            )
    return found
