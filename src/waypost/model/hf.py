"""Hugging Face folders in and out: parameter names, weights, models. config.json itself is read in `hf_config`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from waypost.core.batch import Batch
from waypost.core.errors import CheckpointError, ConfigError, ShapeError
from waypost.core.state import Entry, TensorSpec, local_box
from waypost.keep.format import dtype_name
from waypost.keep.reader import Checkpoint
from waypost.model.adapter_names import is_adapter, stored_name
from waypost.model.config import ModelConfig
from waypost.model.decoder import Decoder
from waypost.model.families import FAMILIES
from waypost.model.hf_config import NEUTRAL, config_from_hf, config_to_hf, read_config, stock_type, with_dtype
from waypost.model.linear.int8 import check_stored

if TYPE_CHECKING:
    from waypost.kernels import Ops

__all__ = [
    "NEUTRAL",
    "assemble",
    "config_from_hf",
    "config_to_hf",
    "entries",
    "from_hf_name",
    "hf_renamer",
    "load",
    "logits",
    "read_config",
    "stock_type",
    "to_hf_name",
]

_MIXTRAL_OUT = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_MIXTRAL_IN = {value: key for key, value in _MIXTRAL_OUT.items()}


def hf_renamer(config: ModelConfig) -> Callable[[str], str]:
    """The map from our parameter names to those of the folder that `config` is written to; for many names at once."""
    family = FAMILIES.get(stock_type(config))
    if family is None or family.experts != "mixtral":
        return lambda name: name

    def rename(name: str) -> str:
        name = re.sub(r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.", name)
        return re.sub(r"(\.experts\.\d+\.)(gate_proj|up_proj|down_proj)", lambda m: m[1] + _MIXTRAL_OUT[m[2]], name)

    return rename


def to_hf_name(config: ModelConfig, name: str) -> str:
    """Our parameter name in Hugging Face's spelling for the class that `config` is written with."""
    return hf_renamer(config)(name)


def from_hf_name(config: ModelConfig, name: str) -> str:
    """The inverse of `to_hf_name`; a name that is no parameter's comes back as it is."""
    name = name.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"(\.mlp\.experts\.\d+\.)(w[123])\b", lambda m: m[1] + _MIXTRAL_IN[m[2]], name)


def entries(model: Decoder) -> list[Entry]:
    """The weights as a state table: live views under Hugging Face names, role "weight"; DTensor shards as boxes. Those of an
    adapter have the role "adapter", and PEFT's names. ConfigError where weights in few bits have no numbers to save."""
    check_stored(model)
    rename = hf_renamer(model.config)
    table = []
    for name, parameter in model.named_parameters():
        local, shape, box = local_box(parameter)
        role, stored = ("adapter", stored_name(name)) if is_adapter(name) else ("weight", rename(name))
        table.append(Entry(TensorSpec(stored, dtype_name(local.dtype), shape, role), box, local))
    return table


def load(
    path: str | Path | Checkpoint, dtype: torch.dtype | None = None, ops: Ops | None = None, *, mapped: bool = False,
    verify: bool = True,
) -> Decoder:  # fmt: skip
    """The model of a checkpoint, a Hugging Face folder or a run, in memory of its own: one copy of the weights.

    `dtype` casts every weight; None keeps the file's. The weights are trainable (requires_grad). With `mapped`, weights
    that need no cast stay views of the file: there at once, read when they are touched, and a write to them stays in
    memory. With `verify`, every weight's digest is checked first, where there is a manifest: about 0.15 s a gigabyte.
    Weights that the folder holds in few bits come as the bfloat16 numbers that they mean; `quantized.load` keeps them packed.
    Linears that round their rows too (LLM.int8()) stay as they are served: their weights are not trainable, nor to be saved.

    CheckpointError: a weight is damaged, missing, left over, or of another shape than config.json asks for.
    """
    from waypost.model.linear import quantized

    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype={dtype!r}: give a torch.dtype such as torch.bfloat16, or None to keep the file's")
    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    if verify:
        checkpoint.verify_weights()
    where = str(checkpoint.path)
    if quantized.is_quantized(checkpoint.config):
        return quantized.load_dense(checkpoint, dtype, ops, copy=not mapped)
    return assemble(config_from_hf(checkpoint.config), _Mapped(checkpoint, mapped), dtype, ops, where=where, copy=not mapped)


class _Mapped(Mapping[str, Tensor]):
    """The weights of a checkpoint, memory-mapped; the pages of each are given back when the next is asked for, unless
    `keep_pages`."""

    def __init__(self, checkpoint: Checkpoint, keep_pages: bool) -> None:
        self._checkpoint, self._names, self._last = checkpoint, checkpoint.names, ""
        self._keep_pages = keep_pages

    def __getitem__(self, name: str) -> Tensor:
        if ("weight", name) not in self._checkpoint.specs:
            raise KeyError(name)
        if not self._keep_pages and self._last not in ("", name):
            self._checkpoint.release(self._last)
        self._last = name
        return self._checkpoint.tensor(name)

    def __contains__(self, name: object) -> bool:
        return ("weight", name) in self._checkpoint.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def assemble(
    config: ModelConfig,
    stored: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    ops: Ops | None = None,
    *,
    where: str = "the weights",
    copy: bool = True,
) -> Decoder:
    """A decoder of `config` with copies of the `stored` tensors under Hugging Face names, as `load` describes.

    Without `copy`, tensors that need no cast become parameters themselves.
    The experts of a layer may be stored one by one, or fused as transformers 5 holds them in memory.
    """
    with torch.device("meta"):
        model = Decoder(config, ops)
    rename = hf_renamer(config)
    sources = {name: _source(name, rename(name), stored) for name, _ in model.named_parameters()}
    _check_names(config, {name: source.name for name, source in sources.items()}, stored, where)
    copies: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found = sources[name].take(stored)
        if found.shape != parameter.shape:
            raise CheckpointError(
                f"{where}: '{sources[name].name}' gives {list(found.shape)} for {name}, config.json asks for "
                f"{list(parameter.shape)}; the folder mixes two models"
            )
        if found.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(
                f"{where}: '{sources[name].name}' holds {dtype_name(found.dtype)}; quantised weights cannot be computed "
                "with here, take the folder with the full weights"
            )
        copies[name] = found.to(dtype or found.dtype, copy=copy)
    model.load_state_dict(copies, assign=True)
    model.config = with_dtype(config, str(next(iter(copies.values())).dtype).removeprefix("torch."))
    return model


@dataclass(frozen=True)
class _Source:
    """Where a parameter comes from: a stored tensor, or the part of one that holds all experts of a layer."""

    name: str
    expert: int | None = None
    half: int | None = None

    def take(self, stored: Mapping[str, Tensor]) -> Tensor:
        tensor = stored[self.name]
        if self.expert is None:
            return tensor
        part = tensor[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]


def _source(name: str, expected: str, stored: Mapping[str, Tensor]) -> _Source:
    """The stored tensor behind our parameter `name`; where there is none, the name that was `expected`."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expected in stored or (expert is None and name not in stored):
        return _Source(expected)
    if expert is None or name in stored:
        return _Source(name)
    kind = "down_proj" if expert[3] == "down" else "gate_up_proj"
    fused = f"{expert[1]}.{kind}"  # (E, C, F), and (E, 2F, C) with the gate in the first half
    if fused not in stored:
        return _Source(expected)
    return _Source(fused, int(expert[2]), None if kind == "down_proj" else int(expert[3] == "up"))


def _check_names(config: ModelConfig, sources: Mapping[str, str], stored: Mapping[str, Tensor], where: str) -> None:
    """Every parameter has its tensor and every tensor its use."""
    missing = [source for source in sources.values() if source not in stored]
    if missing:
        close = difflib.get_close_matches(missing[0], list(stored), n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise CheckpointError(
            f"{where}: no tensor '{missing[0]}' ({len(missing)} of {len(sources)} are missing), which config.json asks "
            f"for.{hint} Copy all files of the folder again"
        )
    used = set(sources.values())
    over = [name for name in stored if name not in used and not name.endswith(".rotary_emb.inv_freq")]
    if config.tie_word_embeddings and "lm_head.weight" in over:
        if not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"]):
            raise CheckpointError(
                f"{where}: config.json ties lm_head to the embedding, but the two are stored with different values; set "
                "tie_word_embeddings to false to keep both"
            )
        over.remove("lm_head.weight")
    if over:
        raise CheckpointError(
            f"{where}: tensor '{over[0]}' ({len(over)} in all) belongs to nothing that config.json describes; its "
            "fields do not fit these weights"
        )


@torch.no_grad()
def logits(model: Decoder, token_ids: Sequence[int] | Tensor) -> Tensor:
    """(T,) token ids of one text -> (T, V) in the model's dtype: row t scores the token that follows token_ids[: t + 1].

    ShapeError: the ids are no integers in one dimension, there are none, or one is outside the model's vocabulary.
    """
    ids, vocab_size = torch.as_tensor(token_ids), model.config.vocab_size
    if ids.dim() != 1 or not len(ids) or ids.dtype.is_floating_point or ids.dtype == torch.bool:
        raise ShapeError(f"token_ids of shape {tuple(ids.shape)} and {ids.dtype}: give at least one integer, in one dimension")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ShapeError(f"token_ids from {ids.min()} to {ids.max()}: this model knows 0..{vocab_size - 1}")
    scores: Tensor = model(Batch.of([ids]))
    return scores
