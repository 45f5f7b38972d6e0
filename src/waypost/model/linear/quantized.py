"""Folders whose linears are stored in 4 or 8 bits (scheme.py, stored.py): read packed for inference, or dense.

The weight that is meant is bfloat16(q * scale), with bfloat16 activations: a model that is loaded dense gives the same bits as
one that is served packed. Linears whose rows are rounded too (int8.py) are computed so however the folder is loaded.

Shapes: T rows, K inputs, N outputs, G inputs a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from waypost.core.errors import CheckpointError
from waypost.core.state import TensorSpec
from waypost.keep.format import dtype_name
from waypost.kernels.linear.packed import PackedLinear
from waypost.kernels.linear.quantized import QuantizedWeight
from waypost.model.linear import stored
from waypost.model.linear.dense import Linear
from waypost.model.linear.int8 import put
from waypost.model.linear.scheme import KEY, Layout, from_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from waypost.keep.reader import Checkpoint
    from waypost.kernels import Ops
    from waypost.model.config import ModelConfig
    from waypost.model.decoder import Decoder


def is_quantized(config: Mapping[str, Any]) -> bool:
    """Whether config.json speaks of weights in few bits."""
    return config.get(KEY) is not None


def architecture(config: Mapping[str, Any]) -> ModelConfig:
    """What a config.json describes, however the weights are stored."""
    from waypost.model.hf_config import config_from_hf

    return config_from_hf({key: value for key, value in config.items() if key != KEY})


class PackedFolder(Mapping[str, Tensor]):
    """The weights of a quantised folder under the names of the full one.

    Packed weights come dense in bfloat16, or, with `dense` False, as tensors without storage whose place `packed` fills.
    `tensor` gives a stored tensor by its name, of which `names` are all.
    """

    def __init__(self, layout: Layout, names: Iterable[str], tensor: Callable[[str], Tensor], dense: bool) -> None:
        self.layout, self._tensor, self.dense = layout, tensor, dense
        self.stored = dict.fromkeys(names)
        """The names that the folder has."""
        self._names: dict[str, bool] = {}
        """Name -> whether it is stored packed."""
        for name in self.stored:
            stem, _, part = name.rpartition(".")
            packed = f"{stem}.{stored.PACKED}" in self.stored
            if part == stored.PACKED:
                self._names[f"{stem}.weight"] = True
            elif part not in (stored.SCALE, stored.SHAPE):
                self._names[name] = part == "weight" and f"{stem}.{stored.SCALE}" in self.stored
            elif not packed and (part == stored.SHAPE or f"{stem}.weight" not in self.stored):
                raise CheckpointError(f"'{name}' is there, but '{stem}.{stored.PACKED}' is not; the folder is not whole")

    @staticmethod
    def of(checkpoint: Checkpoint, dense: bool) -> PackedFolder:
        """The folder behind an open checkpoint; `dense` widens packed weights to bfloat16, otherwise they are shapes alone
        (meta)."""
        return PackedFolder(from_config(checkpoint.config), checkpoint.names, checkpoint.tensor, dense)

    def spec(self, name: str) -> TensorSpec:
        """Of the weight `name` as a dense tensor."""
        if self._names[name]:
            return TensorSpec(name, "BF16", self._shape(name), "weight")
        tensor = self._tensor(name)
        return TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape), "weight")

    def _shape(self, name: str) -> tuple[int, int]:
        stem = name.removesuffix(".weight")
        return stored.shape_of(stem, f"{stem}.{stored.PACKED}" in self.stored, self._tensor)

    def is_packed(self, name: str) -> bool:
        """Whether the weight `name` is stored packed."""
        return self._names[name]

    def rounds_rows(self, name: str) -> bool:
        """Whether what the linear `name` is given is rounded too."""
        return self._names[f"{name}.weight"] and self.layout.of(name).rows is not None

    def packed(self, name: str) -> QuantizedWeight:
        """The weight of the linear `name`; CheckpointError where its tensors do not fit each other or config.json."""
        return stored.read(self.layout.of(name), name, self._tensor)

    def __getitem__(self, name: str) -> Tensor:
        if not self._names[name]:
            return self._tensor(name)
        if self.dense:
            return self.packed(name.removesuffix(".weight")).dense()
        return torch.empty(self._shape(name), dtype=torch.bfloat16, device="meta")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load(
    path: str | Path | Checkpoint,
    dtype: torch.dtype | None = None,
    ops: Ops | None = None,
    *,
    packed: bool = True,
    verify: bool = True,
) -> Decoder:
    """The model of a folder for inference, memory-mapped. Quantised linears stay packed where `packed` allows it, in bfloat16
    on the compiled kernels, and are widened to dense weights elsewhere. Raises as `hf.load` does."""
    from waypost.keep.reader import Checkpoint
    from waypost.kernels import select
    from waypost.model import hf

    checkpoint = path if isinstance(path, Checkpoint) else Checkpoint(path)
    ops = ops if ops is not None else select()
    if not is_quantized(checkpoint.config) or not packed or not ops.compiled or dtype not in (None, torch.bfloat16):
        return hf.load(checkpoint, dtype, ops, mapped=True, verify=verify)
    if verify:
        checkpoint.verify_weights()
    return assemble(PackedFolder.of(checkpoint, dense=False), checkpoint, ops)


def load_dense(checkpoint: Checkpoint, dtype: torch.dtype | None, ops: Ops | None, *, copy: bool) -> Decoder:
    """The model of a quantised folder with its weights as the bfloat16 numbers that they mean, as `hf.load` gives it."""
    from waypost.model import hf

    folder, config = PackedFolder.of(checkpoint, dense=True), architecture(checkpoint.config)
    return with_rounded_rows(hf.assemble(config, folder, dtype, ops, where=str(checkpoint.path), copy=copy), folder)


def check(checkpoint: Checkpoint, ops: Ops) -> None:
    """Raises CheckpointError unless the weights of a folder are exactly those that its config.json describes; reads none."""
    from waypost.model import hf

    if not is_quantized(checkpoint.config):
        hf.load(checkpoint.path, ops=ops, mapped=True, verify=False)
        return
    folder = PackedFolder.of(checkpoint, dense=False)
    hf.assemble(architecture(checkpoint.config), folder, None, ops, where=str(checkpoint.path), copy=False)
    for name in folder:
        if folder.is_packed(name):
            folder.packed(name.removesuffix(".weight"))


def assemble(folder: PackedFolder, checkpoint: Checkpoint, ops: Ops) -> Decoder:
    """The model of `checkpoint` whose packed weights stay so, known to its linear operator."""
    from waypost.model import hf

    config, where = architecture(checkpoint.config), str(checkpoint.path)
    linear = PackedLinear(ops.linear)
    model = hf.assemble(config, folder, torch.bfloat16, replace(ops, linear=linear), where=where, copy=False)
    rename = hf.hf_renamer(config)
    for name, parameter in with_rounded_rows(model, folder).named_parameters():
        stem = rename(name).removesuffix(".weight")
        if parameter.is_meta and folder.layout.of(stem).rows is None:
            linear.store(parameter, folder.packed(stem))
    return model.requires_grad_(False)


def with_rounded_rows(model: Decoder, folder: PackedFolder) -> Decoder:
    """`model`, the linears of which `folder` says that their rows are rounded computing so; in place."""
    from waypost.model import hf

    rename = hf.hf_renamer(model.config)
    for name, module in list(model.named_modules()):
        stem = rename(f"{name}.weight").removesuffix(".weight")
        if isinstance(module, Linear) and folder.rounds_rows(stem):
            put(model, name, folder.packed(stem), folder.layout.of(stem))
    return model
